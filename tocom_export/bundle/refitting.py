"""Other weights into the files of a bundle, for one variant, some, or all at once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..errors import BundleError
from ..io.atomic import link_or_copy, replace_folder
from ..io.locking import hear_nothing, is_left
from ..io.tensors import Tensors, map_tensors, read_header
from ..variant import Variant
from .file_hashes import record_files
from .manifest import MANIFEST, WEIGHTS, graph_name, weights_name
from .opening import Bundle
from .weights import ModelWeights
from .writing import Blueprint, describe_graph, describe_shared

Changes = tuple[ModelWeights, Mapping[str, Variant]]
"""What the weights are to be made of, and by their names the variants as they will be."""


def refit_bundle(
    path: Path,
    decide: Callable[[Bundle], Changes],
    check: Callable[[Bundle, Mapping[str, Variant]], None],
    *,
    wait: bool = True,
    tell: Callable[[str], None] = hear_nothing,
) -> Bundle:
    """Other weights for some variants of a bundle, in one step: all of them, or nothing.

    Weights that a variant has alone are exchanged in their file, where each tensor must lie where
    it lay. Where all variants change, so may what they share, and what goes with it: names of
    classes, image statistics, what the files say of themselves. The new bundle is made beside the
    old one, of links to all that stays, and takes its place when it is checked.

    Args:
        decide: called with the bundle as no other writer can change it any more.
        check: called with the bundle as it will be and what changes; when it raises, nothing is
            changed.
        wait, tell: as of :func:`hold`.

    Raises:
        BundleError: a variant has no weights of its own, or others would have to change.
        BusyError, OutputError: as :func:`replace_folder` says.
    """
    with replace_folder(path, wait=wait, tell=tell) as beside:
        bundle = Bundle.open(path, hashes=True)  # what is kept gets no new hash
        new, variants = decide(bundle)
        shared = new.shared()
        whole = variants.keys() == bundle.variants.keys()
        if not whole:
            _check_shared(bundle, variants, new, shared)
        for variant in variants.values():
            weights = {**shared, **_find_own(bundle, variant, new)}
            if (name := weights_name(variant.name)) in bundle.files:
                _rewrite(bundle.path / name, weights, beside / name)
        info = new.checkpoint.info
        made = Blueprint(
            dataclasses.replace(new, spec=bundle.spec),
            bundle.method,
            {**bundle.variants, **variants},
            (info.preprocess or bundle.preprocess) if whole else bundle.preprocess,
            (info.classes or bundle.classes) if whole else bundle.classes,
            outputs=bundle.outputs,
            unit_embedding=bundle.unit_embedding,
        )
        if whole and not _are_stored(shared, bundle):
            _rewrite_shared(bundle, made, shared, beside)
        names = [file.name for file in beside.iterdir()]
        _link_others(path, beside)
        refitted = dict.fromkeys((*bundle.refitted, *variants))
        changed = dataclasses.replace(
            bundle,
            path=beside,
            files={**bundle.files, **record_files(beside, names)},
            variants=made.variants,
            preprocess=made.preprocess,
            classes=made.classes,
            bank=new.bank.sha256 if new.bank else bundle.bank,
            refitted=tuple(name for name in bundle.variants if name in refitted),
            accuracy={n: share for n, share in bundle.accuracy.items() if n not in variants},
        )
        changed.save_manifest()
        check(changed, variants)
    return dataclasses.replace(changed, path=path)


def _check_shared(
    bundle: Bundle, variants: Mapping[str, Variant], new: ModelWeights, shared: Tensors
) -> None:
    """Raise BundleError where what a variant has no own weights for is other than it was."""
    stored = map_tensors(read_header(bundle.path / WEIGHTS)[0])
    for variant in variants.values():
        name = weights_name(variant.name)
        if name not in bundle.files:
            raise BundleError(
                f"{bundle.graph(variant.name)} has no weights of its own: it reads {WEIGHTS}, as "
                "the bundle's other engines do; refit the bundle."
            )
        own, _ = read_header(bundle.path / name)
        for key, tensor in {**shared, **new.own(variant)}.items():
            if key not in own and not (key in stored and np.array_equal(tensor, stored[key])):
                raise BundleError(
                    f"{new.checkpoint.file} has another {key} than the bundle, whose engines all "
                    f"read it from {WEIGHTS}; refit the bundle."
                )


def _find_own(bundle: Bundle, variant: Variant, new: ModelWeights) -> Tensors:
    """What differs in a variant, if its graph reads weights of its own."""
    own = new.own(variant)
    if own and weights_name(variant.name) not in bundle.files:
        raise BundleError(
            f"{bundle.graph(variant.name)} was built without compensation and reads {WEIGHTS} "
            f"alone; from source {variant.source} it needs weights of its own. Refit the others by "
            "their .onnx, or build a bundle of weights that were trained so."
        )
    return own


def _rewrite(file: Path, weights: Tensors, to: Path) -> None:
    """A weights file with other tensors of the same names, each where it lay."""
    before, metadata = read_header(file)
    save_file({key: np.asarray(weights[key]) for key in before}, to, metadata)
    after, _ = read_header(to)
    if any(before[key].offset != after[key].offset for key in before):
        raise BundleError(f"{file} can't be rewritten in its own form; build the bundle again.")


def _are_stored(shared: Tensors, bundle: Bundle) -> bool:
    """Whether the bundle's weights are these already."""
    stored = map_tensors(read_header(bundle.path / WEIGHTS)[0])
    return all(np.array_equal(tensor, stored[name]) for name, tensor in shared.items())


def _rewrite_shared(bundle: Bundle, made: Blueprint, shared: Tensors, beside: Path) -> None:
    """The weights that all variants read, and the graphs, which say where each of them lies."""
    import onnx  # takes a tenth of a second

    save_file(dict(shared), beside / WEIGHTS, describe_shared(made))
    before, after = (read_header(folder / WEIGHTS)[0] for folder in (bundle.path, beside))
    (shift,) = {after[name].offset - before[name].offset for name in shared}
    for variant in made.variants.values():
        graph = onnx.load(str(bundle.graph(variant.name)), load_external_data=False)
        for tensor in graph.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if entries and entries["location"].value == WEIGHTS:
                entries["offset"].value = str(int(entries["offset"].value) + shift)
        onnx.helper.set_model_props(graph, describe_graph(made, variant))
        (beside / graph_name(variant.name)).write_bytes(graph.SerializeToString())


def _link_others(path: Path, beside: Path) -> None:
    """All else that lies there: files that stay, plans, and what others have put beside them."""
    names = [file.name for file in path.iterdir()]
    for file in map(path.joinpath, names):
        to = beside / file.name
        if to.exists() or file.name == MANIFEST or is_left(file.name, names):
            continue
        if file.is_symlink():
            to.symlink_to(file.readlink())
        elif file.is_dir():
            shutil.copytree(file, to, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(file, to)

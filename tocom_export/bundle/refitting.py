"""Other weights into the files of a bundle, for one variant, some, or all at once."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..errors import BundleError
from ..io.atomic import link_or_copy, replace_folder
from ..io.locking import hear_nothing, is_left
from ..io.tensors import StoredTensor, Tensors, map_tensors, read_header
from ..variant import Variant
from .file_hashes import record_files
from .manifest import MANIFEST, WEIGHTS, graph_name, weights_name
from .opening import Bundle
from .weights import ModelWeights
from .writing import Blueprint, describe_graph, describe_shared, write_own

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
    it lay; one that had none and needs some gets a file, and a graph that reads it. Where all
    variants change, so may what they share, and what goes with it: names of classes, image
    statistics, what the files say of themselves. The new bundle is made beside the old one, of
    links to all that stays, and takes its place when it is checked.

    Args:
        decide: called with the bundle as no other writer can change it any more.
        check: called with the bundle as it will be and what changes; when it raises, nothing is
            changed.
        wait, tell: as of :func:`hold`.

    Raises:
        BundleError: a variant has and needs no weights of its own, or others would have to change.
        BusyError, OutputError: as :func:`replace_folder` says.
    """
    with replace_folder(path, wait=wait, tell=tell) as beside:
        bundle = Bundle.open(path, hashes=True)  # what is kept gets no new hash
        new, variants = decide(bundle)
        shared = new.shared()
        whole = variants.keys() == bundle.variants.keys()
        if not whole:
            _check_shared(bundle, variants, new, shared)
        needing = []
        for variant in variants.values():
            if (name := weights_name(variant.name)) in bundle.files:
                weights = {**shared, **new.own(variant)}
                _rewrite(bundle.path / name, weights, beside / name)
            elif new.needs_own(variant):
                write_own(new, variant, beside)
                needing.append(variant)
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
        if whole and not _are_stored(shared, describe_shared(made), bundle):
            save_file(dict(shared), beside / WEIGHTS, describe_shared(made))
            needing = list(variants.values())  # what they read lies elsewhere
        for variant in needing:
            _rewrite_graph(bundle, made, variant, beside)
        names = [file.name for file in beside.iterdir()]
        link_others(path, beside)
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
        name, own = weights_name(variant.name), new.own(variant)
        if name not in bundle.files and not own:
            raise BundleError(
                f"{bundle.graph(variant.name)} has no weights of its own: it reads {WEIGHTS}, as "
                "the bundle's other engines do; refit the bundle."
            )
        kept = read_header(bundle.path / name)[0] if name in bundle.files else own
        for key, tensor in {**shared, **own}.items():
            if key not in kept and not (key in stored and np.array_equal(tensor, stored[key])):
                raise BundleError(
                    f"{new.checkpoint.file} has another {key} than the bundle, whose engines all "
                    f"read it from {WEIGHTS}; refit the bundle."
                )


def _rewrite(file: Path, weights: Tensors, to: Path) -> None:
    """A weights file with other tensors of the same names, each where it lay."""
    before, metadata = read_header(file)
    save_file({key: np.asarray(weights[key]) for key in before}, to, metadata)
    after, _ = read_header(to)
    if any(before[key].offset != after[key].offset for key in before):
        raise BundleError(f"{file} can't be rewritten in its own form; build the bundle again.")


def _are_stored(shared: Tensors, metadata: Mapping[str, str], bundle: Bundle) -> bool:
    """Whether the bundle's weights are these already, and say of themselves what they shall."""
    stored, said = read_header(bundle.path / WEIGHTS)
    kept = map_tensors(stored)
    return metadata == said and all(np.array_equal(shared[name], kept[name]) for name in shared)


def _rewrite_graph(bundle: Bundle, made: Blueprint, variant: Variant, beside: Path) -> None:
    """A variant's graph, which says where each of its weights lies: in the new files, else as was.

    What was measured for it, the ranges of int8, stays in it.
    """
    import onnx  # takes a tenth of a second

    places: dict[str, StoredTensor] = {}
    for name in (WEIGHTS, weights_name(variant.name)):
        if (beside / name).exists():
            places |= read_header(beside / name)[0]
        elif name in bundle.files:
            places |= read_header(bundle.path / name)[0]
    graph = onnx.load(str(bundle.graph(variant.name)), load_external_data=False)
    for tensor in graph.graph.initializer:
        if tensor.external_data:
            found = places[tensor.name]
            entries = {entry.key: entry for entry in tensor.external_data}
            entries["location"].value = found.file.name
            entries["offset"].value = str(found.offset)
    onnx.helper.set_model_props(graph, describe_graph(made, variant))
    (beside / graph_name(variant.name)).write_bytes(graph.SerializeToString())


def link_others(path: Path, beside: Path, without: Sequence[str] = ()) -> None:
    """All else that lies there: files that stay, plans, and what others have put beside them.

    Args:
        without: names of files that don't stay.
    """
    names = [file.name for file in path.iterdir()]
    for file in map(path.joinpath, names):
        to = beside / file.name
        if to.exists() or file.name in (MANIFEST, *without) or is_left(file.name, names):
            continue
        if file.is_symlink():
            to.symlink_to(file.readlink())
        elif file.is_dir():
            shutil.copytree(file, to, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(file, to)

"""Other weights into the files of a bundle's ONNX engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import save_file

from tocom_export.bundle.file_hashes import record_files
from tocom_export.bundle.manifest import WEIGHTS, weights_name
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights
from tocom_export.errors import BundleError
from tocom_export.io.atomic import link_or_copy, replace_file
from tocom_export.io.tensors import map_tensors, read_header
from tocom_export.variant import Variant


def refit_graph(
    bundle: Bundle,
    variant: Variant,
    new: ModelWeights,
    check: Callable[[Bundle], None] | None = None,
) -> Bundle:
    """Other weights for one variant of a bundle: its own weights file, and the manifest.

    The graph is left as it is: every tensor must lie where it lay, and what the engine shares
    with the bundle's others be what it was.

    Args:
        variant: as it will be; of the same name and degrees as the bundle's.
        new: a checkpoint that was checked against the bundle's spec.
        check: called with the bundle as it will be, in a folder of its own that has this variant
            alone; when it raises, nothing is changed.

    Raises:
        BundleError: the variant has no weights of its own, or others would have to change.
    """
    name = weights_name(variant.name)
    if name not in bundle.files:
        raise BundleError(
            f"{bundle.graph(variant.name)} has no weights of its own: it reads {WEIGHTS}, as the "
            "bundle's other engines do; build a bundle of the new ones."
        )
    weights = {**new.shared(), **new.own(variant)}
    before, metadata = read_header(bundle.path / name)
    stored = map_tensors(read_header(bundle.path / WEIGHTS)[0])
    for key, tensor in weights.items():
        same = key in before or (key in stored and np.array_equal(tensor, stored[key]))
        if not same:
            raise BundleError(
                f"{new.checkpoint.file} has another {key} than the bundle, whose engines all read "
                f"it from {WEIGHTS}; build a bundle of it."
            )
    del stored  # mapped: Windows would not let the file be linked
    with TemporaryDirectory(prefix=f".{name}.", dir=bundle.path) as folder:
        beside = Path(folder)
        save_file({key: weights[key] for key in before}, beside / name, metadata)
        after, _ = read_header(beside / name)
        if any(before[key].offset != after[key].offset for key in before):
            raise BundleError(f"{name} can't be rewritten in its own form; build the bundle again.")
        changed = dataclasses.replace(
            bundle,
            files={**bundle.files, **record_files(beside, [name])},
            variants={**bundle.variants, variant.name: variant},
            refitted=tuple(dict.fromkeys((*bundle.refitted, variant.name))),
            accuracy={n: percent for n, percent in bundle.accuracy.items() if n != variant.name},
        )
        if check:  # on the new weights among links to the bundle's other files
            for other in (WEIGHTS, bundle.graph(variant.name).name):
                link_or_copy(bundle.path / other, beside / other)
            check(dataclasses.replace(changed, path=beside))
        bundle.save_manifest(later=changed)
        with replace_file(bundle.path / name) as file:
            (beside / name).replace(file)
    changed.save_manifest()
    return changed

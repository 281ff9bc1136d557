"""More variants for a bundle that is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..errors import BundleError, brief
from ..io.atomic import replace_folder
from ..io.locking import hear_nothing
from ..io.tensors import map_tensors, read_header
from ..variant import Variant
from .file_hashes import record_files
from .manifest import WEIGHTS, graph_name, weights_name
from .opening import Bundle
from .refitting import link_others
from .weights import ModelWeights
from .writing import Blueprint, write_variant

_SCALE = ".input_scale"


def add_variants(
    path: Path,
    weights: ModelWeights,
    variants: Iterable[Variant],
    *,
    wait: bool = True,
    tell: Callable[[str], None] = hear_nothing,
) -> Bundle:
    """Add variants to a bundle, or put them in the place of others of their names; in one step.

    What all variants share stays as it is. In int8 a variant takes the ranges of its layers'
    inputs from the one that costs nearly as much.

    Args:
        weights: what the bundle was made of.
        wait, tell: as of :func:`~tocom_export.io.locking.hold`.

    Raises:
        BundleError: the bundle is damaged, or was made of other weights.
        BusyError, OutputError: as :func:`~tocom_export.io.atomic.replace_folder` says.
    """
    with replace_folder(path, wait=wait, tell=tell) as beside:
        bundle = Bundle.open(path, hashes=True)
        new = {variant.name: variant for variant in variants}
        _check_shared(bundle, weights)
        made = Blueprint(
            weights, bundle.method, {**bundle.variants, **new}, bundle.preprocess, bundle.classes,
            outputs=bundle.outputs, unit_embedding=bundle.unit_embedding,
        )  # fmt: skip
        gone = [weights_name(name) for name in new] + [graph_name(name) for name in new]
        link_others(path, beside, without=gone)
        for variant in new.values():
            write_variant(made, variant, beside, read_input_scales(bundle, variant))
        names = [file for file in gone if (beside / file).exists()]
        changed = dataclasses.replace(
            bundle,
            path=beside,
            variants=made.variants,
            files={
                **{name: record for name, record in bundle.files.items() if name not in gone},
                **record_files(beside, names),
            },
            plans=tuple(name for name in bundle.plans if name not in new),
            bank=weights.bank.sha256 if weights.bank else bundle.bank,
            refitted=tuple(name for name in bundle.refitted if name not in new),
            accuracy={n: share for n, share in bundle.accuracy.items() if n not in new},
        )
        changed.save_manifest()
    return dataclasses.replace(changed, path=path)


def read_input_scales(bundle: Bundle, variant: Variant) -> Mapping[str, float] | None:
    """Of an int8 bundle: layer → what one step of its int8 input stands for; else None.

    From the graph of the variant itself, or else of the one that costs nearly as much.

    Raises:
        BundleError: that graph is damaged.
    """
    if bundle.precision != "int8":
        return None

    def differ(other: Variant) -> tuple[bool, int]:
        here, there = (v.schedule(bundle.spec).macs(bundle.spec) for v in (variant, other))
        return other.name != variant.name, abs(here - there)

    near = min(bundle.variants.values(), key=differ)
    file = bundle.graph(near.name)
    try:
        initializers = ir.load(file).graph.initializers
        return {
            name.removesuffix(_SCALE): float(value.const_value.numpy())
            for name, value in initializers.items()
            if name.endswith(_SCALE) and value.const_value is not None
        }
    except Exception as error:  # of many types: a damaged file
        raise BundleError(f"{file} can't be read ({brief(error)}); build it again.") from error


def _check_shared(bundle: Bundle, weights: ModelWeights) -> None:
    stored = map_tensors(read_header(bundle.path / WEIGHTS)[0])
    for name, tensor in weights.shared().items():
        if name not in stored or not np.array_equal(tensor, stored[name]):
            raise BundleError(f"{bundle.path} was made of other weights: its {name} differs.")

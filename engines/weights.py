"""The weights of all of a bundle's degrees, in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.bake import bake, qkv_name
from tocom_export.bank import ToComBank
from tocom_export.bundle import WEIGHTS, Bundle, weights_name
from tocom_export.checkpoint import Checkpoint
from tocom_export.engines.refit import NewWeights, base_checkpoint
from tocom_export.quantize import quantized_layers, stored_form
from tocom_export.records import load_recorded

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class WeightSet:
    """What the engines of a bundle run on at one time, in the types that it stores."""

    shared: Callable[[], Tensors]
    """The tensors that all targets share; the same arrays at each call."""
    own: Callable[[int], Tensors]
    """Those in which a target differs, made at each call."""
    uncompensated: Callable[[], Tensors]
    """The qkv weights that a compensation starts from, as exact as they are known."""
    origin: Callable[[int], tuple[int, float]]
    """A target's source and scale."""
    renewed: bool = True
    """Whether these are others than the bundle's files hold."""


def bundled(bundle: Bundle) -> WeightSet:
    """The weights in a bundle's files, read when they are first needed.

    What is read is held against the manifest, as it was when the bundle was opened, and stays in
    memory: nothing that is done to the files later reaches an engine.
    """

    @cache
    def shared() -> Tensors:
        return load_recorded(bundle.path / WEIGHTS, bundle.files[WEIGHTS])

    def own(target: int) -> Tensors:
        name = weights_name(target)
        if name not in bundle.files:
            return {}
        return load_recorded(bundle.path / name, bundle.files[name])

    def uncompensated() -> Tensors:
        if bundle.precision == "fp32":
            return shared()
        checkpoint = base_checkpoint(bundle.path / WEIGHTS, bundle.spec, bundle.precision)
        checkpoint.fit(bundle.spec)
        return _qkv(bundle, checkpoint)

    def origin(target: int) -> tuple[int, float]:
        now = bundle.refitted.get(target, bundle)
        return now.source, now.scale

    return WeightSet(shared, own, uncompensated, origin, renewed=False)


def exchanged_checkpoint(bundle: Bundle, new: NewWeights) -> WeightSet:
    """A checkpoint's weights in place of a bundle's, compensated for each target.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    stored = new.shared(bundle.spec, bundle.precision)
    shared = {name: _in_memory(tensor) for name, tensor in stored.items()}
    exact = shared if bundle.precision == "fp32" else _qkv(bundle, new.checkpoint)
    return _compensated(bundle, lambda: shared, exact, new.bank, new.source, new.scale)


def compensated_anew(
    bundle: Bundle, now: WeightSet, bank: ToComBank | None, source: int, scale: float
) -> WeightSet:
    """The weights that a bundle has now, for another source or scale; shared ones stay shared.

    Raises:
        CheckpointError: the bundle is of int8, from which nothing can be compensated.
    """
    return _compensated(bundle, now.shared, now.uncompensated(), bank, source, scale)


def _compensated(
    bundle: Bundle,
    shared: Callable[[], Tensors],
    exact: Tensors,
    bank: ToComBank | None,
    source: int,
    scale: float,
) -> WeightSet:
    spec = bundle.spec

    def own(target: int) -> Tensors:
        if bank is None or target == source:
            return {}
        baked = bake(exact, spec, bank, source, target, scale)
        return stored_form(baked, bundle.precision, quantized_layers(spec))

    return WeightSet(shared, own, lambda: exact, lambda _: (source, scale))


def _qkv(bundle: Bundle, checkpoint: Checkpoint) -> Tensors:
    names = [qkv_name(layer) for layer in range(bundle.spec.depth)]
    return {name: np.array(checkpoint.tensors[name]) for name in names}


def _in_memory(tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, or a copy of one that a file backs."""
    base: Any = tensor
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return np.array(tensor)
        base = base.base
    return tensor

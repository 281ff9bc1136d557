"""The weights of all of a bundle's degrees, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tocom_export.bundle.file_hashes import load_recorded, read_recorded
from tocom_export.bundle.opening import WEIGHTS, Bundle, weights_name
from tocom_export.compression.bake import bake, qkv_name
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.errors import BundleError
from tocom_export.graph.quantising import quantized_layers, stored_form

from .refit import NewWeights, base_checkpoint

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
    graphs: Mapping[int, bytes]
    """Target → its graph."""
    plans: Mapping[int, tuple[int, ...]]
    """Target → which file its plan is."""
    renewed: bool
    """Whether these are others than the bundle's files hold."""


def bundled(
    bundle: Bundle, targets: Iterable[int], runner: Literal["onnx", "plan"] = "onnx"
) -> WeightSet:
    """The weights in a bundle's files, read when they are first needed, and its graphs.

    What is read is held against the manifest, as it was when the bundle was opened, and stays in
    memory: nothing that is done to the files later reaches an engine.

    Raises:
        BundleError: a graph is missing, or not what the manifest says.
        DegreeError: the bundle has no such target, or no plan for it.
    """
    graphs, plans = {}, {}
    for target in targets:
        if runner == "plan":
            plans[target] = identity(bundle.plan(target))
        else:
            graph = bundle.graph(target)
            graphs[target] = read_recorded(graph, bundle.files[graph.name])

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
        own = Checkpoint(bundle.path / WEIGHTS, shared(), ModelInfo())
        checkpoint = base_checkpoint(own, bundle.spec, bundle.precision)
        checkpoint.fit(bundle.spec)
        return _qkv(bundle, checkpoint)

    def origin(target: int) -> tuple[int, float]:
        now = bundle.refitted.get(target, bundle)
        return now.source, now.scale

    return WeightSet(shared, own, uncompensated, origin, graphs, plans, renewed=False)


def exchanged_checkpoint(bundle: Bundle, now: WeightSet, new: NewWeights) -> WeightSet:
    """A checkpoint's weights in place of a bundle's, compensated for each target.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    stored = new.shared(bundle.spec, bundle.precision)
    shared = {name: _in_memory(tensor) for name, tensor in stored.items()}
    exact = shared if bundle.precision == "fp32" else _qkv(bundle, new.checkpoint)
    changed = dataclasses.replace(now, shared=lambda: shared)
    return _compensated(bundle, changed, exact, new.bank, new.source, new.scale)


def compensated_anew(
    bundle: Bundle, now: WeightSet, bank: ToComBank | None, source: int, scale: float
) -> WeightSet:
    """The weights that a bundle has now, for another source or scale; shared ones stay shared.

    Raises:
        CheckpointError: the bundle is of int8, from which nothing can be compensated.
    """
    return _compensated(bundle, now, now.uncompensated(), bank, source, scale)


def _compensated(
    bundle: Bundle,
    now: WeightSet,
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

    return dataclasses.replace(
        now, own=own, uncompensated=lambda: exact, origin=lambda _: (source, scale), renewed=True
    )


def identity(file: Path) -> tuple[int, ...]:
    """Tells a file from one that is put in its place, without reading it.

    Raises:
        BundleError: it is missing.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise BundleError(f"{file}: can't be read: {error.strerror}.") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


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

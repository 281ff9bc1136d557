"""From a bundle's variant to an engine, on whichever backend."""

from __future__ import annotations

from typing import Any, Literal, get_args

from tocom_export.bundle.file_hashes import load_recorded
from tocom_export.bundle.manifest import WEIGHTS, weights_name
from tocom_export.bundle.opening import Bundle
from tocom_export.errors import InputError
from tocom_export.io.tensors import Tensors
from tocom_export.variant import Variant

from .engine import Engine

Backend = Literal["onnx", "tensorrt", "tensorrt-rtx"]


def open_engine(
    bundle: Bundle,
    variant: Variant,
    *,
    backend: Backend = "onnx",
    device: Any = "cpu",
    threads: int | None = None,
    weights: Tensors | None = None,
    graph: bytes | None = None,
    host_code: bool = False,
) -> Engine:
    """A bundle's variant, ready to run.

    Args:
        device: where ONNX Runtime runs; a plan runs on the GPU that CUDA uses.
        threads: of ONNX Runtime within an operator; None leaves it to the runtime.
        weights: all tensors of the variant; a plan must let go of those that differ.
        graph: in place of the bundle's file, for ONNX Runtime.
        host_code: let a version-compatible plan run the code that it brings along.

    Raises:
        PlanError: a plan of another variant, or that doesn't let go of the weights.
        TocomError: what opening an engine of that backend raises.
    """
    check_backend(backend)
    if threads is not None and threads < 1:
        raise InputError(f"`threads` {threads}: there is one at least.")
    if backend == "onnx":
        from .onnx.engine import OnnxEngine

        return OnnxEngine(
            bundle, variant, device=device, threads=threads, weights=weights, graph=graph
        )
    from .tensorrt.engine import TensorRtEngine
    from .tensorrt.plan import check_plan, select_refittable

    plan = bundle.plan(variant.name)
    engine = TensorRtEngine(plan, host_code=host_code)
    record = engine.record
    if record.backend != backend:
        raise InputError(f"`backend` {backend}: {plan} is of {record.backend}.")
    check_plan(bundle, variant.name, record)
    if weights is None and record.stripped:
        weights = read_weights(bundle, WEIGHTS, weights_name(variant.name))
    if weights is not None:
        engine.refit(select_refittable(record, weights, plan))
        engine.variant = variant
    return engine


def read_weights(bundle: Bundle, *names: str) -> Tensors:
    """The tensors of some weights files, of those that a bundle has, held against its manifest."""
    files = {bundle.path / name: bundle.files[name] for name in names if name in bundle.files}
    return {k: tensor for file in files.items() for k, tensor in load_recorded(*file).items()}


def check_backend(backend: str) -> None:
    """Raise InputError where there is no such backend."""
    if backend not in (known := get_args(Backend)):
        raise InputError(f"`backend` {backend!r}: it is {', '.join(known)}.")

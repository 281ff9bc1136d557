"""From a bundle's variant to an engine, on whichever backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from tocom_export.bundle.file_hashes import load_recorded
from tocom_export.bundle.manifest import WEIGHTS, weights_name
from tocom_export.bundle.opening import Bundle
from tocom_export.errors import InputError
from tocom_export.io.tensors import Tensors
from tocom_export.variant import Variant

from .engine import Backend, Engine
from .picking import resolve

_SOME = {
    "device": (None, ("onnx", "openvino")),
    "graph": (None, ("onnx",)),
    "threads": (None, ("onnx", "openvino")),
    "compensated": (True, ("onnx", "openvino")),
    "inference_precision": ("auto", ("openvino",)),
    "hint": ("latency", ("openvino",)),
    "streams": (None, ("openvino",)),
    "host_code": (False, ("tensorrt", "tensorrt-rtx")),
}
"""Options that are for some backends alone: their defaults, and which."""


def open_engine(
    bundle: Bundle,
    variant: Variant,
    *,
    backend: Backend | Literal["auto"] = "onnx",
    device: Any = None,
    threads: int | None = None,
    streams: int | None = None,
    hint: Literal["latency", "throughput"] = "latency",
    inference_precision: Literal["auto", "f32", "bf16"] = "auto",
    batch: int | Sequence[int] = (),
    compensated: bool = True,
    weights: Tensors | None = None,
    graph: bytes | None = None,
    host_code: bool = False,
) -> Engine:
    """A bundle's variant, ready to run.

    Args:
        backend: ``auto`` is what was picked for this machine (``bench --pick``), else ONNX
            Runtime, else OpenVINO in float32.
        device: where it runs. ONNX Runtime: cpu (the default), cuda, tensorrt; OpenVINO: CPU (the
            default), GPU, NPU, AUTO; a plan runs on the GPU that CUDA uses.
        threads: of a CPU; None leaves it to the runtime.
        streams: runs side by side in OpenVINO; None leaves it to the hint.
        hint: what OpenVINO is tuned for.
        inference_precision: what OpenVINO computes in where the graph says float32; auto leaves
            it to the device, and the engine's ``precision`` says what that chose.
        batch: sizes of batches that will come: OpenVINO compiles a faster model for each.
        compensated: False runs the checkpoint's own weights: token reduction alone.
        weights: all tensors of the variant; a plan must let go of those that differ.
        graph: in place of the bundle's file, for ONNX Runtime.
        host_code: let a version-compatible plan run the code that it brings along.

    Raises:
        InputError: an option that is not for this backend.
        PlanError: a plan of another variant, or that doesn't let go of the weights.
        TocomError: what opening an engine of that backend raises.
    """
    chosen, inference_precision = resolve(bundle, backend, device, inference_precision)
    check_backend(
        chosen, device=device, threads=threads, streams=streams, hint=hint, host_code=host_code,
        inference_precision=inference_precision, compensated=compensated, graph=graph,
    )  # fmt: skip
    if threads is not None and threads < 1:
        raise InputError(f"`threads` {threads}: there is one at least.")
    if weights is not None and not compensated:
        raise InputError("`weights` are given: they are what they are, `compensated` or not.")
    if chosen == "onnx":
        from .onnx.engine import OnnxEngine

        provider: Any = device.lower() if device else "cpu"
        return OnnxEngine(
            bundle, variant, device=provider, threads=threads, compensated=compensated,
            weights=weights, graph=graph,
        )  # fmt: skip
    if chosen == "openvino":
        from .openvino.engine import OpenVinoEngine
        from .openvino.library import Settings

        settings = Settings(device or "CPU", inference_precision, hint, threads, streams)
        return OpenVinoEngine(
            bundle, variant, settings=settings, batch=batch, weights=weights,
            compensated=compensated,
        )  # fmt: skip
    return _open_plan(bundle, variant, chosen, weights, host_code)


def _open_plan(
    bundle: Bundle,
    variant: Variant,
    backend: Backend,
    weights: Tensors | None,
    host_code: bool,
) -> Engine:
    from .tensorrt.engine import TensorRtEngine
    from .tensorrt.identical import add_constants
    from .tensorrt.plan import check_plan, select_refittable

    plan = bundle.plan(variant.name)
    engine = TensorRtEngine(plan, host_code=host_code)
    record = engine.record
    if record.backend != backend:
        raise InputError(f"`backend` {backend}: {plan} is of {record.backend}.")
    check_plan(bundle, variant.name, record)
    if weights is None and record.stripped:
        weights = read_weights(bundle, WEIGHTS, weights_name(variant.name))
    if weights is not None and record.refit == "identical":
        weights = add_constants(bundle, variant.name, weights)
    if weights is not None:
        engine.refit(select_refittable(record, weights, plan))
        engine.variant = variant
    return engine


def read_weights(bundle: Bundle, *names: str) -> Tensors:
    """The tensors of some weights files, of those that a bundle has, held against its manifest."""
    files = {bundle.path / name: bundle.files[name] for name in names if name in bundle.files}
    return {k: tensor for file in files.items() for k, tensor in load_recorded(*file).items()}


def check_backend(backend: str, **options: Any) -> None:
    """Raise InputError where there is no such backend, or an option is not for it.

    Args:
        options: of :func:`open_engine`; one that is at its default goes with any.
    """
    if backend not in (known := get_args(Backend)):
        raise InputError(f"`backend` {backend!r}: it is {', '.join(known)}.")
    for name, value in options.items():
        default, owners = _SOME[name]
        if value != default and backend not in owners:
            raise InputError(f"`{name}` is for `backend` {' and '.join(owners)}.")

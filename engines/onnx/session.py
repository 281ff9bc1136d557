"""Opening a bundle's graph in ONNX Runtime."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tocom_export.bundle.opening import Bundle, read_unchanged
from tocom_export.errors import BundleError, DeviceError, InputError, MissingPackageError, brief
from tocom_export.io.telemetry import decline_telemetry
from tocom_export.io.tensors import Tensors

Device = Literal["cpu", "cuda", "tensorrt"]
"""What ONNX Runtime calls a provider."""
DEVICES: dict[Device, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3}


@cache
def _share_allocator() -> None:
    """One arena for the activations of all engines; it grows by what is asked for, no more."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtArenaCfg

    kind, use = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    memory = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, use)
    try:
        onnxruntime.create_and_register_allocator(memory, OrtArenaCfg({"arena_extend_strategy": 1}))
    except Exception as error:  # a host application may have made one; releases differ in the type
        if "already" not in str(error):
            raise


def open_session(
    bundle: Bundle,
    variant: str,
    device: Device,
    threads: int | None,
    *,
    weights: Tensors | None = None,
    graph: bytes | None = None,
) -> tuple[Any, list[Any]]:
    """An ``onnxruntime.InferenceSession`` of a bundle's variant, and what must outlive it.

    Arguments and errors are those of :class:`~tocom_export.engines.onnx.engine.OnnxEngine`.
    """
    onnxruntime = _import_onnxruntime(device)
    file = bundle.graph(variant)
    if not _is_utf8(file):
        raise BundleError(f"{file}: ONNX Runtime opens no path that isn't UTF-8; rename it.")
    options = _choose_options(onnxruntime, bundle, device, threads)
    widen = bundle.precision == "bf16" and device == "cpu"
    if widen:  # optimised, the roundings between two operators might be taken for superfluous
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    read = {name: tensor for name, tensor in (weights or {}).items() if bundle.reads(name)}
    held = _hold(options, read, device) if read else []
    given = {"use_tf32": "0"} if device == "cuda" else {}  # else float32 products are rounded

    def make() -> Any:
        content: str | bytes = graph or str(file)
        if widen:
            from .bfloat16 import widen_file

            content = widen_file(graph or file.read_bytes())
        return onnxruntime.InferenceSession(
            content, options, providers=[(DEVICES[device], given)], enable_fallback=0
        )

    try:
        session = read_unchanged(bundle.path, make)
    except BundleError:
        raise
    except Exception as error:  # ONNX Runtime raises bare pybind exceptions of many types
        raise BundleError(f"{file}: ONNX Runtime can't open it ({brief(error)}).") from error
    if (got := session.get_providers()[0]) != DEVICES[device]:
        raise DeviceError(
            f"`device` {device}: ONNX Runtime gave {got} instead; are the libraries that "
            f"{DEVICES[device]} needs installed?"
        )
    session.disable_fallback()  # else a failing run goes on, on the CPU
    return session, held


def _is_utf8(file: Path) -> bool:
    """Whether a path can be given to a library that takes text."""
    try:
        str(file).encode()
    except UnicodeEncodeError:  # bytes that Python keeps as halves of surrogates
        return False
    return True


def _import_onnxruntime(device: Device) -> Any:
    """The module, once it knows the device."""
    if device not in DEVICES:
        raise InputError(f"`device` {device!r}: it is {', '.join(DEVICES)}.")
    decline_telemetry()
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackageError("onnxruntime", "cpu" if device == "cpu" else "gpu") from None
    known = onnxruntime.get_available_providers()
    if DEVICES[device] not in known:
        have = ", ".join(name for name, provider in DEVICES.items() if provider in known)
        raise DeviceError(
            f"`device` {device}: this ONNX Runtime {onnxruntime.__version__} has {have}; "
            "onnxruntime-gpu, in place of onnxruntime, brings cuda and tensorrt."
        )
    return onnxruntime


def _choose_options(onnxruntime: Any, bundle: Bundle, device: Device, threads: int | None) -> Any:
    entries = {
        # Prepacking copies every weight into private memory; without it all engines of a
        # bundle run from the same mapped pages, at the same speed. int8 weights are a quarter
        # as large, and packed anew at every run they would cost a quarter of the time.
        "disable_prepacking": "0" if bundle.precision == "int8" else "1",
        # Each session has threads of its own, which spin a while after a run; on a machine
        # where another engine runs next, they would take its processors (15 % of its speed).
        "force_spinning_stop": "1",
        # Where the weights lie of a graph that is given as bytes.
        "model_external_initializers_file_folder_path": str(bundle.path),
    }
    if device == "cpu":
        _share_allocator()
        entries["use_env_allocators"] = "1"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _hold(options: Any, weights: Tensors, device: Device) -> list[Any]:
    """Have a session take its weights from arrays; what is returned must outlive it."""
    import onnxruntime

    make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    values = {}
    for name, tensor in weights.items():
        kind = tensor.dtype.name
        array = tensor.view(np.uint16) if kind == "bfloat16" else tensor
        values[name] = make(array, _ONNX_TYPES[kind])
    # In the graph, which is optimised with them: a constant that is folded must not come from
    # the files. Beyond that each session would have its own copy; so on a CPU they are also
    # given as initializers that sessions share.
    options.add_external_initializers(list(values), list(values.values()))
    if device == "cpu":
        for name, value in values.items():
            options.add_initializer(name, value)
    return list(values.values())

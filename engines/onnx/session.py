"""Opening a bundle's graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import BundleError, MissingPackageError, ProviderError, brief
from tocom_export.io.tensors import read_header

Provider = Literal["cpu", "cuda", "tensorrt"]
_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3}
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where the weights lie of a graph that is given as bytes."""


@cache
def _share_allocator() -> None:
    """One arena for the activations of all engines, made once in a process.

    Engines that don't run at the same time then use the same memory. The arena grows by what
    is asked for, not by powers of two.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtArenaCfg

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu",
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        onnxruntime.OrtMemType.DEFAULT,
    )
    try:
        onnxruntime.create_and_register_allocator(memory, OrtArenaCfg({"arena_extend_strategy": 1}))
    except Exception as error:  # a host application may have made one; releases differ in the type
        if "already" not in str(error):
            raise


def open_session(
    bundle: Bundle,
    target: int,
    provider: Provider,
    threads: int | None,
    compensated: bool,
    weights: Mapping[str, npt.NDArray[Any]] | None = None,
    graph: bytes | None = None,
) -> tuple[Any, list[Any]]:
    """An ``onnxruntime.InferenceSession`` of one target of a bundle, and what must outlive it.

    Args:
        provider: where to run; one that the runtime does not give is an error.
        threads: threads within an operator; None leaves it to the runtime.
        compensated: False runs the checkpoint's own weights at that degree.
        weights: all tensors of the target, as stored, in place of those in the bundle's files;
            a CPU reads them where they lie.
        graph: the target's graph, in place of the bundle's file.

    Raises:
        DegreeError, MissingPackageError, ProviderError, BundleError: as
            :class:`~tocom_export.engines.onnx.engine.OnnxEngine` says.
    """
    try:
        import onnxruntime
    except ImportError:
        extra = "cpu" if provider == "cpu" else "gpu"
        raise MissingPackageError("onnxruntime", extra) from None
    file = bundle.graph(target)
    wanted = _PROVIDERS[provider]
    if wanted not in onnxruntime.get_available_providers():
        have = ", ".join(
            n for n, full in _PROVIDERS.items() if full in onnxruntime.get_available_providers()
        )
        raise ProviderError(
            f"--provider {provider}: this ONNX Runtime {onnxruntime.__version__} has {have}; "
            "onnxruntime-gpu, in place of onnxruntime, brings cuda and tensorrt."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Prepacking copies every weight into private memory; without it all engines of a
    # bundle run from the same mapped pages, at the same speed.
    options.add_session_config_entry("session.disable_prepacking", "1")
    # Each session has threads of its own, which spin a while after a run; on a machine
    # where another engine runs next, they would take its processors (15 % of its speed).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if provider == "cpu":
        _share_allocator()
        options.add_session_config_entry("session.use_env_allocators", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    content: str | bytes = graph or str(file)
    narrow = bundle.precision == "bf16" and provider == "cpu"
    if narrow or not compensated:
        content = _altered(bundle, target, compensated, narrow, graph or file.read_bytes())
        options.add_session_config_entry(WEIGHTS_FOLDER, str(bundle.path))
    held = _hold(options, weights, provider) if weights else []
    if narrow:  # optimised, the roundings between two operators might be taken for superfluous
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = {"use_tf32": "0"} if provider == "cuda" else {}  # else float32 products are rounded
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=[(wanted, given)], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime raises bare pybind exceptions of many types
        raise BundleError(f"{file}: ONNX Runtime can't open it ({brief(error)}).") from error
    if wanted != session.get_providers()[0]:
        raise ProviderError(
            f"--provider {provider}: ONNX Runtime gave {session.get_providers()[0]} "
            f"instead; are the libraries that {wanted} needs installed?"
        )

    session.disable_fallback()  # else a failing run goes on, on the CPU
    return session, held


def _hold(options: Any, weights: Mapping[str, npt.NDArray[Any]], provider: Provider) -> list[Any]:
    """Have a session take its weights from arrays; what is returned must outlive it."""
    import onnxruntime

    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            tensor.view(np.uint16) if tensor.dtype.name == "bfloat16" else tensor,
            _ONNX_TYPES[tensor.dtype.name],
        )
        for name, tensor in weights.items()
    }
    # In the graph, which is optimised with them: a constant that is folded must not come from
    # the files. Beyond that each session would have its own copy; so on a CPU they are also
    # given as initializers that sessions share.
    options.add_external_initializers(list(values), list(values.values()))
    if provider == "cpu":
        for name, value in values.items():
            options.add_initializer(name, value)
    return list(values.values())


def _altered(bundle: Bundle, target: int, compensated: bool, narrow: bool, graph: bytes) -> bytes:
    """A target's graph with other weights or with bfloat16 widened, as the file would hold it.

    What a target's weights file replaces is read from the shared file instead where the engine
    is not to be compensated.
    """
    import onnx

    model = onnx.load_from_string(graph)
    if not compensated:
        shared, *own = (read_header(file)[0] for file in bundle.weight_files(target))
        names = {name for header in own for name in header}
        for tensor in model.graph.initializer:
            if tensor.name in names:
                stored = shared[tensor.name]
                place = {"location": stored.file.name, "offset": stored.offset}
                for entry in tensor.external_data:
                    entry.value = str({**place, "length": stored.length}[entry.key])
    if narrow:
        from .bfloat16 import widen

        widen(model)
    content: bytes = model.SerializeToString()
    return content

"""One degree of a bundle in ONNX Runtime."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from tocom_export.bundle import Bundle
from tocom_export.errors import (
    BundleError,
    ImageError,
    MissingPackageError,
    ProviderError,
    brief,
)
from tocom_export.store import read_header

Provider = Literal["cpu", "cuda", "tensorrt"]
_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


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
    onnxruntime.create_and_register_allocator(memory, OrtArenaCfg({"arena_extend_strategy": 1}))


class OnnxEngine:
    """A bundle's graph at one target degree, ready to run. Safe to share among threads.

    The weights are mapped from the bundle's files and not repacked, so that engines of one
    bundle share them in memory. On a CPU, which has no bfloat16 operators, bf16 is computed in
    float32 and rounded after each operator: slow, and right.

    Args:
        bundle: an opened bundle.
        target: one of its degrees.
        provider: where to run. One that the runtime does not give is an error; it would
            otherwise fall back to the CPU in silence.
        threads: threads within an operator; None leaves it to the runtime.
        compensated: False runs the checkpoint's own weights at that degree: token reduction
            alone, to compare with.

    Raises:
        DegreeError: the bundle has no such target.
        MissingPackageError: ONNX Runtime is not installed.
        ProviderError: the provider asked for is not what the session got.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: int,
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        compensated: bool = True,
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            extra = "cpu" if provider == "cpu" else "gpu"
            raise MissingPackageError("onnxruntime", extra) from None
        graph = bundle.graph(target)
        self.spec = bundle.spec
        self.target = target
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
        content: str | bytes = str(graph)
        narrow = bundle.precision == "bf16" and provider == "cpu"
        if narrow or not compensated:
            content = _altered(bundle, target, compensated, narrow)
            folder = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(folder, str(bundle.path))
        if narrow:  # optimised, the roundings between two operators might be taken for superfluous
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(
                content, options, providers=[wanted], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime raises bare pybind exceptions of many types
            raise BundleError(f"{graph}: ONNX Runtime can't open it ({brief(error)}).") from error
        if wanted != self._session.get_providers()[0]:
            raise ProviderError(
                f"--provider {provider}: ONNX Runtime gave {self._session.get_providers()[0]} "
                f"instead; are the libraries that {wanted} needs installed?"
            )

        self._session.disable_fallback()  # else a failing run goes on, on the CPU

    def run(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (B, classes) float32 of normalised images (B, C, H, W) float32.

        Raises:
            ImageError: the array has another shape or dtype, or is empty.
        """
        expected = (self.spec.channels, *self.spec.image_size)
        if images.ndim != 4 or images.shape[1:] != expected or not len(images):
            raise ImageError(
                f"images have shape {images.shape}; (B, {', '.join(map(str, expected))}) "
                "with B ≥ 1 is expected."
            )
        if images.dtype != np.float32:
            raise ImageError(f"images are {images.dtype}; float32 is expected.")
        logits: npt.NDArray[np.float32] = self._session.run(None, {"images": images})[0]
        return logits


def _altered(bundle: Bundle, target: int, compensated: bool, narrow: bool) -> bytes:
    """A target's graph with other weights or with bfloat16 widened, as the file would hold it.

    What a target's weights file replaces is read from the shared file instead where the engine
    is not to be compensated.
    """
    import onnx

    model = onnx.load(bundle.graph(target), load_external_data=False)
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
        from tocom_export.engines.widened import widen

        widen(model)
    content: bytes = model.SerializeToString()
    return content

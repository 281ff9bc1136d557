"""A TensorRT or TensorRT-RTX plan, ready to run."""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.engines import refitter
from tocom_export.engines.cuda import call, find_gpu, runtime
from tocom_export.engines.nvidia import Nvidia, open_library
from tocom_export.engines.plan import PlanRecord, open_plan
from tocom_export.errors import DeviceError, ImageError, PlanError


class TensorRtEngine:
    """A deserialized plan. Safe to share among threads.

    Images are copied through page-locked memory. What a batch size does is recorded as a CUDA
    graph the first time it is seen, where the engine allows that, and launched as one from then on.

    Args:
        plan: an ``rNN.plan`` with its JSON beside it.
        streams: how many runs may be on the GPU at a time; each has a context and buffers.
        cuda_graphs: False launches each kernel by itself.

    Raises:
        PlanError: the plan is damaged, of another GPU or another version of the library, or
            stripped of its weights.
        DeviceError: there is no GPU, or too little memory on it.
        MissingPackageError: the library or cuda-python is not installed.
    """

    def __init__(self, plan: Path, *, streams: int = 1, cuda_graphs: bool = True) -> None:
        content, record = open_plan(plan)
        self.record = record
        self.spec, self.target = record.spec, record.target
        self._nvidia = open_library(record.library)
        self._engine = deserialize(self._nvidia, plan, content, record)
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._streams, self._opened, self._cuda_graphs = streams, 0, cuda_graphs
        self._ready = not record.stripped
        if self._ready:
            self._open_lanes()

    def run(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (B, classes) float32 of normalised images (B, C, H, W) float32.

        Raises:
            ImageError: the array has another shape or dtype, or a batch that the plan wasn't
                built for.
            PlanError: the plan is stripped, and was not refitted yet.
        """
        expected = (self.spec.channels, *self.spec.image_size)
        smallest, _, largest = self.record.batch
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ImageError(
                f"images have shape {images.shape}; (B, {', '.join(map(str, expected))}) is "
                "expected."
            )
        if not smallest <= len(images) <= largest:
            raise ImageError(
                f"a batch of {len(images)} images; the plan takes {smallest} to {largest} (build "
                "--batch MIN,OPT,MAX)."
            )
        if images.dtype != np.float32:
            raise ImageError(f"images are {images.dtype}; float32 is expected.")
        if not self._ready:
            raise PlanError(
                "the plan is stripped of its weights; tocom-export refit gives it some."
            )
        lane = self._lanes.get()
        try:
            return lane.run(images)
        finally:
            self._lanes.put(lane)

    def refit(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Exchange the refittable weights; all of them, absolute values.

        Raises:
            PlanError: inference is in flight; a weight is missing, or of another form.
        """
        with self._all_lanes() as lanes:
            refitter.check_weights(self.record, weights)
            self._ready = False  # half-refitted, should the library fail
            refitter.refit(self._nvidia, self._engine, self.record, weights)
            for lane in lanes:
                lane.forget_graphs()
        if not lanes:  # it was stripped
            self._open_lanes()
        self._ready = True

    def serialize(self) -> bytes:
        """The plan with the weights it has now, which can be refitted again.

        Raises:
            PlanError: inference is in flight, or the library can't save it.
        """
        with self._all_lanes():
            return refitter.serialized(self._nvidia, self._engine)

    def _open_lanes(self) -> None:
        for _ in range(self._streams):
            self._lanes.put(_Lane(self._engine, self.record, self._cuda_graphs))
        self._opened = self._streams

    @contextmanager
    def _all_lanes(self) -> Iterator[list[_Lane]]:
        """Every lane, taken so that nothing can run meanwhile; an error where one is in use."""
        lanes: list[_Lane] = []
        try:
            while len(lanes) < self._opened:
                lanes.append(self._lanes.get_nowait())
            yield lanes
        except queue.Empty:
            raise PlanError(
                "inference is in flight; an engine is refitted or saved while it is idle."
            ) from None
        finally:
            for lane in lanes:
                self._lanes.put(lane)


def deserialize(nvidia: Nvidia, plan: Path, content: bytes, record: PlanRecord) -> Any:
    """The library's engine of a plan.

    Raises:
        DeviceError: there is no GPU.
        PlanError: the library refuses it; the message says what differs from where it was built.
    """
    gpu = find_gpu()
    if gpu is None:
        raise DeviceError(f"{plan}: no GPU that CUDA can use; plans run on one.")
    library = nvidia.trt.Runtime(nvidia.logger)
    if "VERSION_COMPATIBLE" in record.flags:
        library.engine_host_code_allowed = True  # of our own building
    engine = library.deserialize_cuda_engine(content)
    if engine is None:
        differs = []
        if record.version != nvidia.version:
            differs.append(f"built by {record.library} {record.version}, this is {nvidia.version}")
        if record.compute_capability not in (None, gpu.capability):
            differs.append(f"built for {record.gpu}, this is {gpu.name}")
        why = "; ".join(differs) or nvidia.reason("no reason given")
        raise PlanError(f"{plan} can't be opened here ({why}); build it here.")
    return engine


class _Lane:
    """One stream with a context and buffers for the largest batch."""

    def __init__(self, engine: Any, record: PlanRecord, cuda_graphs: bool) -> None:
        self._cuda = runtime()
        self._engine = engine  # a context needs its engine alive
        self._context = engine.create_execution_context()
        if self._context is None:
            raise DeviceError("the engine gets no context; is there memory left on the GPU?")
        self._stream = call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)
        largest = record.batch[2]
        image = (record.spec.channels, *record.spec.image_size)
        self._images = _Buffer(self._cuda, (largest, *image))
        self._logits = _Buffer(self._cuda, (largest, record.spec.classes or record.spec.width))
        self._context.set_tensor_address("images", self._images.device)
        self._context.set_tensor_address("logits", self._logits.device)
        self._cuda_graphs = cuda_graphs
        self._graphs: dict[int, Any] = {}
        self._shape: tuple[int, ...] | None = None

    def run(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        batch = len(images)
        self._images.host[:batch] = images
        if batch in self._graphs:
            call(self._cuda.cudaGraphLaunch, self._graphs[batch], self._stream)
            self._wait()
        else:
            self._enqueue(images.shape)
            self._wait()
            if self._cuda_graphs:
                self._record(images.shape)
        logits: npt.NDArray[np.float32] = self._logits.host[:batch].copy()
        return logits

    def forget_graphs(self) -> None:
        """After a refit; what was recorded may have the old weights in it."""
        for graph in self._graphs.values():
            call(self._cuda.cudaGraphExecDestroy, graph)
        self._graphs.clear()

    def _enqueue(self, shape: tuple[int, ...]) -> None:
        if shape != self._shape:
            if not self._context.set_input_shape("images", shape):
                raise DeviceError(f"the engine refuses images of shape {shape}.")
            self._shape = shape
        kinds, stream = self._cuda.cudaMemcpyKind, self._stream
        self._images.copy(shape[0], kinds.cudaMemcpyHostToDevice, stream)
        if not self._context.execute_async_v3(int(stream)):
            raise DeviceError("the engine failed to run; is there memory left on the GPU?")
        self._logits.copy(shape[0], kinds.cudaMemcpyDeviceToHost, stream)

    def _record(self, shape: tuple[int, ...]) -> None:
        """The same as a graph; an engine that can't be captured is launched as before."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(self._cuda.cudaStreamBeginCapture, self._stream, mode)
        try:
            self._enqueue(shape)
        except DeviceError:
            self._cuda_graphs = False
        status, graph = self._cuda.cudaStreamEndCapture(self._stream)
        if int(status) or not self._cuda_graphs:
            self._cuda_graphs = False
            return
        self._graphs[shape[0]] = call(self._cuda.cudaGraphInstantiate, graph, 0)
        call(self._cuda.cudaGraphDestroy, graph)

    def _wait(self) -> None:
        call(self._cuda.cudaStreamSynchronize, self._stream)

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._cuda.cudaStreamSynchronize(self._stream)
            for graph in getattr(self, "_graphs", {}).values():
                self._cuda.cudaGraphExecDestroy(graph)
            self._cuda.cudaStreamDestroy(self._stream)


class _Buffer:
    """float32 numbers on the GPU, and page-locked ones to copy them from or to."""

    def __init__(self, cuda: Any, shape: tuple[int, ...]) -> None:
        self._cuda = cuda
        self._row = 4 * int(np.prod(shape[1:]))
        size = self._row * shape[0]
        self.device = int(call(cuda.cudaMalloc, size))
        self._pointer = int(call(cuda.cudaMallocHost, size))
        content = (ctypes.c_byte * size).from_address(self._pointer)
        self.host = np.ctypeslib.as_array(content).view(np.float32).reshape(shape)

    def copy(self, rows: int, kind: Any, stream: Any) -> None:
        """Between the two, in the direction of ``kind``."""
        to, start = self._pointer, self.device
        if kind == self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice:
            to, start = start, to
        call(self._cuda.cudaMemcpyAsync, to, start, rows * self._row, kind, stream)

    def __del__(self) -> None:
        if hasattr(self, "device"):
            self._cuda.cudaFree(self.device)
        if hasattr(self, "_pointer"):
            self._cuda.cudaFreeHost(self._pointer)

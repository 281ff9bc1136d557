"""A TensorRT or TensorRT-RTX plan, ready to run."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.errors import DeviceError, ImageError, PlanError

from . import refitter
from .cuda import call, find_gpu, runtime, why_no_gpu
from .library import Nvidia, open_library
from .plan import PlanRecord, check_host_code, open_plan


class TensorRtEngine:
    """A deserialized plan. Safe to share among threads.

    Images are copied through page-locked memory; a batch below the plan's smallest is filled up.
    What runs is recorded as a CUDA graph where the engine allows that, and launched as one for as
    long as batches are of the same size (TensorRT-RTX does so by itself).

    Args:
        plan: an ``rNN.plan`` with its JSON beside it.
        streams: how many runs may be on the GPU at a time; each has a context and buffers.
        cuda_graphs: False launches each kernel by itself.
        host_code: let a version-compatible plan run the code that it brings along; say so of
            plans from people you trust.
        unsaved: what a plan's file and its JSON will hold; ``plan`` is then not read.

    Raises:
        PlanError: the plan is damaged, or of another GPU or another version of the library.
        DeviceError: there is no GPU, or too little memory on it.
        MissingPackageError: the library or cuda-python is not installed.
    """

    def __init__(
        self,
        plan: Path,
        *,
        streams: int = 1,
        cuda_graphs: bool = True,
        host_code: bool = False,
        unsaved: tuple[bytes, PlanRecord] | None = None,
    ) -> None:
        content, record = unsaved or open_plan(plan)
        self.record = record
        self.spec, self.target = record.spec, record.target
        self._nvidia = open_library(record.library)
        self._engine = deserialize(self._nvidia, plan, content, record, host_code)
        self._changing = threading.Lock()
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        self._streams, self._opened, self._cuda_graphs = streams, 0, cuda_graphs
        self._ready = not record.stripped
        if self._ready:
            self._open_lanes()

    def run(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (B, classes) float32 of normalised images (B, C, H, W) float32.

        Raises:
            ImageError: the array has another shape or dtype, or a batch beyond the plan's
                largest.
            PlanError: the plan is stripped and was not refitted yet, or a refit failed.
        """
        expected = (self.spec.channels, *self.spec.image_size)
        smallest, _, largest = self.record.batch
        if images.ndim != 4 or images.shape[1:] != expected or not len(images):
            raise ImageError(
                f"images have shape {images.shape}; (B, {', '.join(map(str, expected))}) "
                "with B ≥ 1 is expected."
            )
        if len(images) > largest:
            raise ImageError(
                f"a batch of {len(images)} images; the plan takes {largest} at most (build "
                "--batch MIN,OPT,MAX)."
            )
        if images.dtype != np.float32:
            raise ImageError(f"images are {images.dtype}; float32 is expected.")
        with self._lane() as lane:
            return lane.run(images, max(smallest, len(images)))

    def run_again(self, batch: int) -> None:
        """Run what lies on the GPU as a batch of so many, without copies: to time the GPU alone.

        Raises:
            ImageError: the batch is none that the plan takes.
            PlanError: as :meth:`run`.
        """
        smallest, _, largest = self.record.batch
        if not smallest <= batch <= largest:
            raise ImageError(f"a batch of {batch}; the plan takes {smallest} to {largest}.")
        with self._lane() as lane:
            lane.launch(batch, copies=False)

    def refit(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Exchange the refittable weights; all of them, absolute values.

        Raises:
            PlanError: inference is in flight; a weight is missing, or of another form.
        """
        with self._changing, self._all_lanes() as lanes:
            refitter.check_weights(self.record, weights)
            self._ready = False  # half-refitted, should the library fail
            refitter.refit(self._nvidia, self._engine, self.record, weights)
            for lane in lanes:
                lane.forget_graph()
            if not lanes:  # it was stripped
                self._open_lanes()
            self._ready = True

    def serialize(self) -> bytes:
        """The plan with the weights it has now, which from TensorRT 10.14 can be refitted again.

        Raises:
            PlanError: inference is in flight, or the library can't save it.
        """
        with self._changing, self._all_lanes():
            return refitter.serialized(self._nvidia, self._engine, self.record.stripped)

    @property
    def refittable(self) -> bool:
        """Whether the library can refit it; TensorRT before 10.14 may save a plan that it can't."""
        return bool(self._engine.refittable)

    def _open_lanes(self) -> None:
        for _ in range(self._streams):
            self._lanes.put(_Lane(self._nvidia, self._engine, self.record, self._cuda_graphs))
        self._opened = self._streams

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """A lane that nobody else uses meanwhile."""
        if not self._opened:
            raise PlanError(
                "the plan is stripped of its weights; tocom-export refit gives it some."
            )
        lane = self._lanes.get()
        try:
            if not self._ready:
                raise PlanError("a refit failed, and left the engine with mixed weights; refit it.")
            yield lane
        finally:
            self._lanes.put(lane)

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


def deserialize(
    nvidia: Nvidia, plan: Path, content: bytes, record: PlanRecord, host_code: bool = False
) -> Any:
    """The library's engine of a plan, of the form that its record says.

    Raises:
        DeviceError: there is no GPU.
        PlanError: the library refuses it; the message says what differs from where it was built.
    """
    gpu = find_gpu()
    if gpu is None:
        raise DeviceError(f"{plan}: no GPU that CUDA can use ({why_no_gpu()}); plans run on one.")
    check_host_code(plan, record, host_code)
    try:
        engine = refitter.open_engine(nvidia, content, host_code)
    except PlanError as error:
        differs = []
        if record.version != nvidia.version:
            differs.append(f"built by {record.library} {record.version}, this is {nvidia.version}")
        if record.compute_capability not in (None, gpu.capability):
            differs.append(f"built for {record.gpu}, this is {gpu.name}")
        # The difference may not be the reason, which can be a lack of memory, say.
        why = "; ".join([*differs, str(error)] if nvidia.errors or not differs else differs)
        raise PlanError(f"{plan} can't be opened here ({why}); build it here.") from None
    _check_form(nvidia, engine, plan, record)
    return engine


def _check_form(nvidia: Nvidia, engine: Any, plan: Path, record: PlanRecord) -> None:
    """Buffers are made after the record: an engine of other shapes would write beyond them."""
    image = (record.spec.channels, *record.spec.image_size)
    wanted = {"images": image, "logits": (record.spec.classes or record.spec.width,)}
    # A plan for one batch alone may say which.
    first = {-1, record.batch[0]} if record.batch[0] == record.batch[2] else {-1}
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    found = {name: tuple(engine.get_tensor_shape(name)) for name in names}
    single = all(engine.get_tensor_dtype(name) == nvidia.trt.DataType.FLOAT for name in names)
    batch: tuple[int, ...] = ()
    if "images" in names:
        batch = tuple(shape[0] for shape in engine.get_tensor_profile_shape("images", 0))
    fits = {name: shape[1:] for name, shape in found.items()} == wanted
    if not (fits and {shape[0] for shape in found.values()} <= first and single) or (
        batch != record.batch
    ):
        raise PlanError(
            f"{plan} takes {found} in batches of {batch}, its JSON says {wanted} in batches of "
            f"{record.batch}; the two are not of one build."
        )


class _Lane:
    """One stream with a context and buffers for the largest batch."""

    def __init__(self, nvidia: Nvidia, engine: Any, record: PlanRecord, cuda_graphs: bool) -> None:
        self._cuda = runtime()
        self._engine = engine  # a context needs its engine alive
        rtx = nvidia.library == "tensorrt-rtx"
        self._context = (
            _rtx_context(nvidia, engine, cuda_graphs) if rtx else engine.create_execution_context()
        )
        if self._context is None:
            raise DeviceError("the engine gets no context; is there memory left on the GPU?")
        self._stream = call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)
        largest = record.batch[2]
        image = (record.spec.channels, *record.spec.image_size)
        self._images = _Buffer(self._cuda, (largest, *image))
        self._logits = _Buffer(self._cuda, (largest, record.spec.classes or record.spec.width))
        for name, buffer in (("images", self._images), ("logits", self._logits)):
            if not self._context.set_tensor_address(name, buffer.device):
                raise DeviceError(f"the engine refuses the buffer of {name}.")
        self._captures = cuda_graphs and not rtx
        self._graph: Any = None  # of the context's present shape: another one would invalidate it
        self._batch, self._copies = 0, True

    def run(self, images: npt.NDArray[np.float32], batch: int) -> npt.NDArray[np.float32]:
        """Logits of images, run as a batch of so many."""
        count = len(images)
        self._images.host[:count] = images
        self._images.host[count:batch] = 0
        self.launch(batch)
        logits: npt.NDArray[np.float32] = self._logits.host[:count].copy()
        return logits

    def launch(self, batch: int, copies: bool = True) -> None:
        """Run what lies in the buffers, and wait for its end.

        Args:
            copies: from the host and back to it; else what lies on the GPU.
        """
        recorded = self._graph is not None and (batch, copies) == (self._batch, self._copies)
        try:
            if recorded:
                call(self._cuda.cudaGraphLaunch, self._graph, self._stream)
            else:
                self.forget_graph()
                self._enqueue(batch, copies)
            call(self._cuda.cudaStreamSynchronize, self._stream)
        except BaseException:  # Ctrl-C, too: what was begun must end before the next run
            self._cuda.cudaStreamSynchronize(self._stream)
            raise
        if self._captures and not recorded:
            self._capture(batch, copies)

    def forget_graph(self) -> None:
        """After a refit, or before another shape: what was recorded is not what would run."""
        if self._graph is not None:
            call(self._cuda.cudaGraphExecDestroy, self._graph)
            self._graph = None

    def _enqueue(self, batch: int, copies: bool) -> None:
        if batch != self._batch:
            shape = (batch, *self._images.host.shape[1:])
            if not self._context.set_input_shape("images", shape):
                raise DeviceError(f"the engine refuses images of shape {shape}.")
            self._batch = batch
        kinds, stream = self._cuda.cudaMemcpyKind, self._stream
        if copies:
            self._images.copy(batch, kinds.cudaMemcpyHostToDevice, stream)
        if not self._context.execute_async_v3(int(stream)):
            raise DeviceError("the engine failed to run; is there memory left on the GPU?")
        if copies:
            self._logits.copy(batch, kinds.cudaMemcpyDeviceToHost, stream)

    def _capture(self, batch: int, copies: bool) -> None:
        """The same as a graph; an engine that can't be captured is launched as before."""
        cuda, mode = self._cuda, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            call(cuda.cudaStreamBeginCapture, self._stream, mode)
            try:
                self._enqueue(batch, copies)
            finally:
                status, graph = cuda.cudaStreamEndCapture(self._stream)
            if int(status):
                raise DeviceError("the capture failed")
            try:
                self._graph = call(cuda.cudaGraphInstantiate, graph, 0)
                self._copies = copies
            finally:
                call(cuda.cudaGraphDestroy, graph)
        except DeviceError:  # the logits are there already, and come without a graph from now on
            self._captures = False
            cuda.cudaGetLastError()  # else the next call would find this error

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._cuda.cudaStreamSynchronize(self._stream)
            if getattr(self, "_graph", None) is not None:
                self._cuda.cudaGraphExecDestroy(self._graph)
            self._cuda.cudaStreamDestroy(self._stream)


def _rtx_context(nvidia: Nvidia, engine: Any, cuda_graphs: bool) -> Any:
    """A context of TensorRT-RTX, which captures graphs once it has compiled for a shape."""
    config = engine.create_runtime_config()
    # Otherwise other kernels run until those for a shape are compiled in the background: outputs
    # and times would change in the midst of a run.
    config.dynamic_shapes_kernel_specialization_strategy = (
        nvidia.trt.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    strategies = nvidia.trt.CudaGraphStrategy
    config.cuda_graph_strategy = (
        strategies.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategies.DISABLED
    )
    return engine.create_execution_context(config)


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

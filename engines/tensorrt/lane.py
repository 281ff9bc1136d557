"""What one run of a plan takes on the GPU: a stream, a context and buffers."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from tocom_export.errors import DeviceError
from tocom_export.model.outputs import DType

from .cuda import call, runtime
from .library import Nvidia
from .plan import PlanRecord


class Lane:
    """One stream with a context and buffers for the largest batch."""

    def __init__(self, nvidia: Nvidia, engine: Any, record: PlanRecord, cuda_graphs: bool) -> None:
        self._cuda = runtime()
        self._engine = engine  # a context needs its engine alive
        rtx = nvidia.library == "tensorrt-rtx"
        create = engine.create_execution_context
        self._context = create(_configure(nvidia.trt, engine, cuda_graphs)) if rtx else create()
        if self._context is None:
            raise DeviceError("the engine gets no context; is there memory left on the GPU?")
        self._stream = call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking)
        largest, spec = record.batch[2], record.spec
        self._images = Buffer(self._cuda, (largest, spec.channels, *spec.image_size))
        self._outputs = {
            name: Buffer(self._cuda, (largest, *form.shape), form.dtype)
            for name, form in record.forms.items()
        }
        for name, buffer in {"images": self._images, **self._outputs}.items():
            if not self._context.set_tensor_address(name, buffer.device):
                raise DeviceError(f"the engine refuses the buffer of {name}.")
        self._captures = cuda_graphs and not rtx
        self._graph: Any = None  # of the context's present shape: another one would invalidate it
        self._batch, self._copies = 0, True

    def run(self, images: npt.NDArray[np.float32], batch: int) -> dict[str, npt.NDArray[Any]]:
        """Each output of images by name, run as a batch of so many."""
        count = len(images)
        self._images.host[:count] = images
        self._images.host[count:batch] = 0
        self.launch(batch)
        return {name: buffer.host[:count].copy() for name, buffer in self._outputs.items()}

    def launch(self, batch: int, copies: bool = True) -> None:
        """Run what lies in the host's buffers or, without copies, the GPU's; wait for its end."""
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
        if copies:
            self._images.copy(batch, self._stream, to_device=True)
        if not self._context.execute_async_v3(int(self._stream)):
            raise DeviceError("the engine failed to run; is there memory left on the GPU?")
        if copies:
            for buffer in self._outputs.values():
                buffer.copy(batch, self._stream, to_device=False)

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
        except DeviceError:  # the outputs are there already, and come without a graph from now on
            self._captures = False
            cuda.cudaGetLastError()  # else the next call would find this error

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self._cuda.cudaStreamSynchronize(self._stream)
            if getattr(self, "_graph", None) is not None:
                self._cuda.cudaGraphExecDestroy(self._graph)
            self._cuda.cudaStreamDestroy(self._stream)


def _configure(trt: Any, engine: Any, cuda_graphs: bool) -> Any:
    """How TensorRT-RTX runs, which captures graphs once it has compiled for a shape."""
    config, graphs = engine.create_runtime_config(), trt.CudaGraphStrategy
    config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if cuda_graphs else graphs.DISABLED
    # Otherwise other kernels run until those for a shape are compiled in the background: outputs
    # and times would change in the midst of a run.
    kernels = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.dynamic_shapes_kernel_specialization_strategy = kernels
    return config


class Buffer:
    """Numbers on the GPU, and page-locked ones to copy them from or to."""

    def __init__(self, cuda: Any, shape: tuple[int, ...], dtype: DType = "float32") -> None:
        self._cuda = cuda
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        self.device = int(call(cuda.cudaMalloc, size))
        self._pointer = int(call(cuda.cudaMallocHost, size))
        content = (ctypes.c_byte * size).from_address(self._pointer)
        self.host = np.ctypeslib.as_array(content).view(dtype).reshape(shape)

    def copy(self, rows: int, stream: Any, *, to_device: bool) -> None:
        """From the host to the device, or back."""
        kinds, size = self._cuda.cudaMemcpyKind, self.host[:rows].nbytes
        to, start, kind = self._pointer, self.device, kinds.cudaMemcpyDeviceToHost
        if to_device:
            to, start, kind = start, to, kinds.cudaMemcpyHostToDevice
        call(self._cuda.cudaMemcpyAsync, to, start, size, kind, stream)

    def __del__(self) -> None:
        if hasattr(self, "device"):
            self._cuda.cudaFree(self.device)
        if hasattr(self, "_pointer"):
            self._cuda.cudaFreeHost(self._pointer)

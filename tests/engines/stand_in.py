"""A TensorRT and a CUDA that record what is asked of them, on a machine that has neither.

The pretended GPU's memory is the host's. A pretended plan holds the weights that were marked, and
its logits depend on each of them and on the images, so that a refit shows.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from safetensors import safe_open


class Cuda:
    """``cuda.bindings.runtime``: each function returns a status and its results."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.gpus, self.capability, self.fails = 1, (8, 9), ""
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.recording: list[Callable[[], object]] | None = None
        self._graphs: dict[int, list[Callable[[], object]]] = {}
        self._numbers = itertools.count(1)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and callable(found := super().__getattribute__(name)):

            def recorded(*arguments: Any) -> Any:
                self.calls.append(name)
                return (2, None) if name == self.fails else found(*arguments)

            recorded.__name__ = name
            return recorded
        return super().__getattribute__(name)

    def do(self, work: Callable[[], object]) -> None:
        """At once, or into the graph that is being captured."""
        work() if self.recording is None else self.recording.append(work)

    def cudaGetDeviceCount(self) -> Any:
        return 0, self.gpus

    def cudaGetDevice(self) -> Any:
        return 0, 0

    def cudaGetDeviceProperties(self, device: int) -> Any:
        major, minor = self.capability
        return 0, SimpleNamespace(name=b"Pretended GPU\0\0", major=major, minor=minor)

    def cudaGetErrorString(self, status: int) -> Any:
        return 0, b"out of memory"

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return 0, next(self._numbers)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return (0,)

    def cudaStreamDestroy(self, stream: int) -> Any:
        return (0,)

    def cudaMalloc(self, size: int) -> Any:
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, pointer: int) -> Any:
        return (0,)  # the memory is kept: views of it may still be looked at

    cudaFreeHost = cudaFree

    def cudaMemcpyAsync(self, to: int, start: int, size: int, kind: int, stream: int) -> Any:
        self.do(lambda: ctypes.memmove(to, start, size))
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        work, self.recording = self.recording, None
        number = next(self._numbers)
        self._graphs[number] = work or []
        return 0, number

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        return 0, graph

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:
        for work in self._graphs[graph]:
            work()
        return (0,)

    def cudaGraphExecDestroy(self, graph: int) -> Any:
        return (0,)

    cudaGraphDestroy = cudaGraphExecDestroy

    def cudaGetLastError(self) -> Any:
        self.recording = None
        return (0,)


class Trt:
    """The module ``tensorrt``, as much of it as we use."""

    class ILogger:
        ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"
        WARNING, INFO, VERBOSE = "WARNING", "INFO", "VERBOSE"

    class IProgressMonitor:
        pass

    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(
        REFIT_INDIVIDUAL="REFIT_INDIVIDUAL",
        REFIT_IDENTICAL="REFIT_IDENTICAL",
        STRIP_PLAN="STRIP_PLAN",
        VERSION_COMPATIBLE="VERSION_COMPATIBLE",
        TF32="TF32",
    )
    HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS")
    SerializationFlag = SimpleNamespace(
        EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS", INCLUDE_REFIT="INCLUDE_REFIT"
    )
    DataType = SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BF16="BF16", INT8="INT8",
                               INT64="INT64", INT32="INT32")  # fmt: skip
    ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
    LayerInformationFormat = SimpleNamespace(JSON="JSON")
    TensorLocation = SimpleNamespace(HOST="HOST")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE", DISABLED="DISABLED")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")

    def __init__(self, cuda: Cuda, version: str = "10.13.3") -> None:
        self.__version__, self.cuda = version, cuda
        self.asked: list[tuple[Any, ...]] = []
        self.refuses: set[str] = set()
        """Steps that fail: parse, mark, build, deserialize, set, refit."""
        self.hides: set[str] = set()
        """Weights that a refitter doesn't mention."""
        self.adds: set[str] = set()
        """Weights that it asks for beside those that were marked."""
        self.fixes_batch = False
        """Whether a plan for one batch alone has its number in place of -1."""

    def Weights(self, kind: str, pointer: int, count: int) -> Any:
        size = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "INT64": 8}[kind]
        content = ctypes.string_at(pointer, count * size)
        return SimpleNamespace(dtype=kind, size=count, content=content)

    def Builder(self, logger: Any) -> Any:
        return _Builder(self, logger)

    def OnnxParser(self, network: _Network, logger: Any) -> Any:
        def parse_from_file(name: str) -> bool:
            network.graph = Path(name)
            return "parse" not in self.refuses

        said = SimpleNamespace(desc=lambda: "an operator it doesn't know")
        return SimpleNamespace(
            parse_from_file=parse_from_file, num_errors=1, get_error=lambda i: said
        )

    def Runtime(self, logger: Any) -> Any:
        def deserialize(content: bytes) -> Any:
            self.asked.append(("deserialize", runtime.engine_host_code_allowed))
            return None if "deserialize" in self.refuses else _Engine(self, content)

        runtime = SimpleNamespace(
            engine_host_code_allowed=False, deserialize_cuda_engine=deserialize
        )
        return runtime

    def Refitter(self, engine: _Engine, logger: Any) -> Any:
        given: dict[str, Any] = {}

        def named(name: str, weights: Any, location: str) -> bool:
            self.asked.append(("set", name, location))
            given[name] = weights.content
            return "set" not in self.refuses

        def refit() -> bool:
            engine.weights.update(given)
            self.asked.append(("refit", sorted(given)))
            return "refit" not in self.refuses

        def prototype(name: str) -> Any:
            kind, count = engine.kinds[name]
            return SimpleNamespace(dtype=kind, size=count)

        return SimpleNamespace(
            get_all_weights=lambda: sorted({*engine.weights} - self.hides | self.adds),
            get_weights_prototype=prototype,
            set_named_weights=named,
            refit_cuda_engine=refit,
        )


class _Network:
    def __init__(self, trt: Trt) -> None:
        self._trt, self.graph, self.marked = trt, Path(), []

    def mark_weights_refittable(self, name: str) -> bool:
        self.marked.append(name)
        return "mark" not in self._trt.refuses


class _Config:
    def __init__(self, trt: Trt) -> None:
        self._trt = trt
        self.flags: list[str] = []
        self.tf32 = True
        self.hardware_compatibility_level = "NONE"
        self.profiling_verbosity = "LAYER_NAMES_ONLY"
        self.progress_monitor: Any = None
        self.shapes: Any = None
        self._cache = b""

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def clear_flag(self, flag: str) -> None:
        assert flag == "TF32"
        self.tf32 = False

    def add_optimization_profile(self, profile: Any) -> None:
        self.shapes = profile.shapes

    def create_timing_cache(self, content: bytes) -> Any:
        return None if content == b"broken" else SimpleNamespace(serialize=lambda: b"timings")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self._trt.asked.append(("cache", ignore_mismatch))
        return True

    def get_timing_cache(self) -> Any:
        return self.create_timing_cache(b"")


class _Builder:
    def __init__(self, trt: Trt, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def create_network(self, flags: int) -> _Network:
        self._trt.asked.append(("network", flags))
        return _Network(self._trt)

    def create_builder_config(self) -> _Config:
        return _Config(self._trt)

    def create_optimization_profile(self) -> Any:
        profile = SimpleNamespace(shapes=None)

        def set_shape(name: str, *shapes: Any) -> None:
            profile.shapes = (name, *shapes)

        profile.set_shape = set_shape
        return profile

    def build_serialized_network(self, network: _Network, config: _Config) -> Any:
        asked = {
            "tf32": config.tf32, "flags": config.flags, "marked": network.marked,
            "shapes": config.shapes, "hardware": config.hardware_compatibility_level,
            "graph": network.graph.name,
        }  # fmt: skip
        self._trt.asked.append(("build", asked))
        self._logger.log("INFO", "building")
        if monitor := config.progress_monitor:
            monitor.phase_start("all", None, 4)
            for step in range(4):
                if not monitor.step_complete("all", step):
                    self._logger.log("ERROR", "the build was cancelled")
                    return None
            monitor.phase_finish("all")
        if {"REFIT_INDIVIDUAL", "REFIT_IDENTICAL"} <= {*config.flags}:
            self._logger.log("ERROR", "REFIT_INDIVIDUAL cannot be used with REFIT_IDENTICAL")
            return None
        if "build" in self._trt.refuses:
            self._logger.log("WARNING", "slow")
            self._logger.log("ERROR", "out of\nmemory")
            return None
        return _plan(network, config, self._trt.fixes_batch)


_KINDS = {1: "FLOAT", 6: "INT32", 10: "HALF", 16: "BF16", 3: "INT8", 7: "INT64"}


def _plan(network: _Network, config: _Config, fixes_batch: bool) -> bytes:
    """The weights that can be refitted, from where they lie, and the tensors' shapes.

    Those are the ones that were marked, or all that the graph has, its own constants included.
    """
    model = onnx.load(network.graph, load_external_data=False)
    strip, weights = "STRIP_PLAN" in config.flags, {}
    for tensor in model.graph.initializer:
        if tensor.name in network.marked or "REFIT_IDENTICAL" in config.flags:
            count = int(np.prod(tensor.dims))
            content = b"" if strip else _read(tensor, network.graph)
            weights[tensor.name] = (_KINDS[tensor.data_type], count, content)
    _, smallest, _, largest = config.shapes
    batch = smallest[0] if fixes_batch and smallest == largest else -1
    tensors = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.output)}
    shapes = {
        name: (_KINDS[kind.elem_type], (batch, *(d.dim_value for d in kind.shape.dim[1:])))
        for name, kind in tensors.items()
    }
    # Attention is fused where its weights are not to be exchanged.
    names = [t.name for t in model.graph.initializer if t.name.endswith("attn.qkv.weight")]
    layers = ["_gemm_mha_v2" if name not in network.marked else "attention" for name in names]
    if config.profiling_verbosity == "DETAILED":
        layers = [{"Name": "kgen", "TacticName": layer} for layer in layers]
    return pickle.dumps((sorted(weights.items()), shapes, config.shapes[1:], layers))


def _read(tensor: onnx.TensorProto, graph: Path) -> bytes:
    if not tensor.external_data:
        return onnx.numpy_helper.to_array(tensor).tobytes()
    place = {entry.key: entry.value for entry in tensor.external_data}
    with safe_open(graph.with_name(place["location"]), "numpy") as file:
        return file.get_tensor(tensor.name).tobytes()


class _Engine:
    def __init__(self, trt: Trt, content: bytes) -> None:
        # Of our own making, above.
        entries, self._shapes, self._profile, self._layers = pickle.loads(content)
        self._trt = trt
        self.refittable = bool(entries) and "refittable" not in trt.refuses
        self.num_io_tensors = len(self._shapes)
        self.kinds = {name: (kind, count) for name, (kind, count, _) in entries}
        self.weights = {name: held for name, (_, _, held) in entries}

    def outputs(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self._shapes.items() if name != "images"}

    def get_tensor_name(self, index: int) -> str:
        return list(self._shapes)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][1]

    def get_tensor_dtype(self, name: str) -> str:
        return self._shapes[name][0]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        assert (name, profile) == ("images", 0)
        return list(self._profile)

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(cuda_graph_strategy=None)

    def create_execution_context(self, config: Any = None) -> Any:
        if config is not None:
            self._trt.asked.append(("context", config.cuda_graph_strategy))
            kernels = getattr(config, "dynamic_shapes_kernel_specialization_strategy", "LAZY")
            self._trt.asked.append(("kernels", kernels))
        return None if "context" in self._trt.refuses else _Context(self._trt, self)

    def create_serialization_config(self) -> Any:
        flags = {"EXCLUDE_WEIGHTS"}
        return SimpleNamespace(flags=flags, clear_flag=flags.discard, set_flag=flags.add)

    def serialize_with_config(self, config: Any) -> bytes:
        self._trt.asked.append(("serialize", sorted(config.flags)))
        return self._content()

    def serialize(self) -> bytes:
        self._trt.asked.append(("serialize", "plainly"))
        return self._content()

    def _content(self) -> bytes:
        entries = [(n, (*self.kinds[n], held)) for n, held in sorted(self.weights.items())]
        return pickle.dumps((entries, self._shapes, self._profile, self._layers))

    def create_engine_inspector(self) -> Any:
        def describe(form: str) -> str:
            assert form == "JSON"
            return json.dumps({"Layers": self._layers, "Bindings": list(self._shapes)})

        return SimpleNamespace(get_engine_information=describe)


class _Context:
    def __init__(self, trt: Trt, engine: _Engine) -> None:
        self._trt, self._engine = trt, engine
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._trt.asked.append(("shape", shape))
        self._shape = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self._trt.cuda.do(self._compute)
        return True

    def _compute(self) -> None:
        count = self._shape[0]
        read = ctypes.string_at(self._addresses["images"], 4 * int(np.prod(self._shape)))
        images = np.frombuffer(read, np.float32).reshape(count, -1)
        sums = [
            float(np.frombuffer(held, np.uint8).sum()) for held in self._engine.weights.values()
        ]
        weighed = np.float32(sum(s * (i + 1) for i, s in enumerate(sums)) % 1009)
        for name, (_, *dims) in self._engine.outputs().items():
            whole = self._engine.get_tensor_dtype(name) == "INT32"
            found = images[:, : int(np.prod(dims))] + weighed
            found = found.astype(np.int32 if whole else np.float32)
            ctypes.memmove(self._addresses[name], found.tobytes(), found.nbytes)

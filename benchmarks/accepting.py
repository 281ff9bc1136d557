"""Graphs read by onnx.checker, ONNX Runtime and NVIDIA's parser, and whether they can be refitted.

NVIDIA's parser is that of TensorRT for RTX, which works without a GPU:
``pip install 'tocom-export[rtx]'``.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import tensorrt_rtx as trt
from common import Row, make_checkpoint

from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule
from tocom_export.graph.writer import write_graph
from tocom_export.io.tensors import read_header
from tocom_export.training.timm_models import spec_of_name

MODELS = (
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
    "deit3_small_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_small_patch14_reg4_dinov2",
)
DEGREES = (0, 4, 8, 12, 16)


def find_unmarkable(file: Path, names: list[str]) -> list[str]:
    """Weights that NVIDIA's parser would not let a refit reach.

    Raises:
        ValueError: the parser refuses the graph.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        raise ValueError(parser.get_error(0).desc())
    return [name for name in names if not network.mark_weights_refittable(name)]


def measure() -> list[Row]:
    """Every model, method and degree; an exception where a graph is refused."""
    graphs = weights = left = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in MODELS:
            spec = spec_of_name(model)
            stored, _ = read_header(make_checkpoint(model, folder))
            methods = (Method("tome"), Method("tome", proportional=False), Method("evit"))
            for method, degree in itertools.product(methods, DEGREES):
                graph = write_graph(spec, Schedule.of(spec, degree), method, stored, {})
                file = folder / "graph.onnx"
                ir.save(graph, file)
                onnx.checker.check_model(str(file), full_check=True)
                onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
                left += len(find_unmarkable(file, list(stored)))
                weights += len(stored)
                graphs += 1
            print(f"{model}: {graphs} graphs so far, {left} weights can't be marked")
    return [
        (
            "graphs accepted by onnx.checker (full), ONNX Runtime and NVIDIA's parser",
            f"{graphs} of {graphs}; {weights - left} of {weights} weights markable by name "
            f"(tensorrt_rtx {trt.__version__})",
            "all",
        )
    ]

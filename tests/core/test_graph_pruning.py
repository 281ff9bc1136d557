"""Pruning as ONNX nodes, against the PyTorch function."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tocom_export.graph.builder import GraphBuilder
from tocom_export.graph.precision import TYPES, Precision
from tocom_export.graph.pruning import prune
from tocom_export.training import pruning as reference

HEADS = 3
Array = npt.NDArray[Any]


def write(tokens: int, remove: int, prefix: int, precision: Precision = "fp32") -> bytes:
    """Tokens and attention → the tokens that are left."""
    types = TYPES[precision]
    builder = GraphBuilder({}, types)
    x = ir.val("x", types.stream, ("batch", tokens, 2))
    attention = ir.val("attention", types.compute, ("batch", HEADS, tokens, tokens))
    out, _ = prune(builder, x, attention, tokens, remove, prefix)
    out.name, out.shape = "out", ir.Shape(["batch", tokens - remove, 2])
    out.type = ir.TensorType(types.stream)
    graph = ir.Graph(
        [x, attention], [out], nodes=builder.nodes, initializers=builder.initializers,
        opset_imports={"": 18}, name="pruning",
    )  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()


def run(model: bytes, x: Array, attention: Array) -> Array:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x, "attention": attention})[0])


def run_in_openvino(model: bytes, x: Array, attention: Array) -> Array:
    core = pytest.importorskip("openvino").Core()
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    return np.asarray(core.compile_model(core.read_model(model), "CPU", config)([x, attention])[0])


def draw(kind: str, tokens: int) -> Array:
    """Attention of two images, in whole numbers, whose mean over heads is exact."""
    rng = np.random.default_rng(tokens)
    attention = rng.integers(0, 99, (2, HEADS, tokens, tokens)).astype(np.float32)
    if kind == "few values":
        attention[:] = rng.integers(0, 3, (2, 1, tokens, tokens))
    elif kind == "zero":
        attention[:] = 0
    elif kind == "one token alone":
        attention[:] = 0
        attention[..., tokens // 2] = 1
    return attention


@pytest.mark.parametrize("kind", ["all differ", "few values", "zero", "one token alone"])
@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("run", [run, run_in_openvino])
def test_graphs_do_what_torch_does(kind: str, prefix: int, run: Any):
    for patches, remove in ((20, 3), (49, 24), (196, 16)):
        tokens = prefix + patches
        x = np.random.default_rng(0).standard_normal((2, tokens, 2)).astype(np.float32)
        attention = draw(kind, tokens)
        row = torch.from_numpy(attention[:, :, 0]).mean(dim=1)
        wanted = reference.prune(torch.from_numpy(x), row, remove, prefix)[0].numpy()
        found = run(write(tokens, remove, prefix), x, attention)
        assert np.array_equal(found, wanted)
        assert np.array_equal(found[:, :prefix], x[:, :prefix])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_the_prefix_is_safe_from_attention_that_is_no_number(precision: Precision, prefix: int):
    tokens, dtype = prefix + 49, TYPES[precision].compute.numpy()
    x = np.arange(2 * tokens * 2).reshape(2, tokens, 2).astype(dtype)
    attention = np.full((2, HEADS, tokens, tokens), np.nan, dtype)
    found = run(write(tokens, 9, prefix, precision), x, attention)
    assert np.array_equal(found[:, :prefix], x[:, :prefix])
    for image, tokens_of_it in zip(found, x, strict=True):
        left = {tuple(token) for token in image.tolist()}
        assert len(left) == tokens - 9
        assert left <= {tuple(token) for token in tokens_of_it.tolist()}

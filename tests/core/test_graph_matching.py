"""Matching, merging and unmerging as ONNX nodes, against the PyTorch functions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tocom_export.graph import matching as graph
from tocom_export.graph.builder import GraphBuilder
from tocom_export.graph.precision import TYPES, Precision
from tocom_export.training import matching as reference

HEADS, HEAD_WIDTH, CHANNELS = 2, 8, 5
OUTPUTS = ("merged", "size", "back", "map")
Array = npt.NDArray[Any]


def write(
    tokens: int, remove: int, prefix: int, precision: Precision = "fp32", sized: bool = True
) -> onnx.ModelProto:
    """Keys, tokens (and their sizes) → what they are after a merge, that undone, and the map."""
    types = TYPES[precision]
    builder = GraphBuilder({}, types)
    shape = ("batch", HEADS, tokens, HEAD_WIDTH)
    inputs = [
        ir.val("keys", types.compute, shape),
        ir.val("x", types.stream, ("batch", tokens, CHANNELS)),
        ir.val("sizes", types.stream, ("batch", tokens, 1)),
    ][: 3 if sized else 2]
    keys, x, *sizes = inputs
    with builder.scope("matching"):
        matching = graph.match(builder, keys, tokens, remove, prefix)
    with builder.scope("merging"):
        merged, size = graph.merge(builder, matching, x, sizes[0] if sized else None)
    with builder.scope("unmerging"):
        back = graph.unmerge(builder, matching, merged)
    with builder.scope("map"):
        places = graph.token_map(builder, matching)
    left = tokens - remove
    outputs = (merged, size, back, places)
    shapes = ((left, CHANNELS), (left, 1), (tokens, CHANNELS), (tokens,))
    for value, name, dims in zip(outputs, OUTPUTS, shapes, strict=True):
        value.name, value.shape = name, ir.Shape(["batch", *dims])
        value.type = ir.TensorType(ir.DataType.INT64 if name == "map" else types.stream)
    whole = ir.Graph(
        inputs,
        outputs,
        nodes=builder.nodes,
        initializers=builder.initializers,
        opset_imports={"": 18},
        name="matching",
    )
    return ir.to_proto(ir.Model(whole, ir_version=8))


def run(model: onnx.ModelProto, *arrays: Array) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(None, dict(zip(names, arrays, strict=True)))
    return dict(zip(OUTPUTS, map(np.asarray, found), strict=True))


def draw(batch: int, tokens: int, seed: int) -> tuple[Array, Array, Array]:
    """Keys that follow a smooth curve, as an image's do; whole tokens; sizes."""
    rng = np.random.default_rng(seed)
    waves = rng.uniform(-9, 9, (2, batch, HEADS, 1, HEAD_WIDTH))
    keys = np.sin(waves[0] * np.linspace(0, 1, tokens)[:, None] + waves[1])
    keys += 0.1 * rng.standard_normal(keys.shape)
    x = rng.integers(-99, 99, (batch, tokens, CHANNELS))
    size = rng.integers(1, 6, (batch, tokens, 1))
    return keys.astype(np.float32), x.astype(np.float32), size.astype(np.float32)


def margin(keys: Array, remove: int, prefix: int) -> float:
    """The smallest difference between two similarities of which one decides a merge.

    Float32 knows a similarity to about 1e-7; closer ones are a tie, which either side may break.
    """
    metric = keys.astype(np.float64).mean(axis=1)
    metric /= np.linalg.norm(metric, axis=-1, keepdims=True)
    a, b = prefix + prefix % 2, prefix + 1 - prefix % 2
    scores = np.sort(metric[:, a::2] @ metric[:, b::2].transpose(0, 2, 1), axis=-1)  # (B, A, B)
    best = -np.sort(-scores[..., -1], axis=-1)  # (B, A), falling
    partners = np.diff(scores[..., -2:]).min(initial=1)
    last = np.diff(-best[:, max(remove - 1, 0) : remove + 1]).min(initial=1)
    return float(min(partners, last))


any_merge = given(
    patches=st.integers(2, 24), prefix=st.integers(0, 6), share=st.floats(0, 1),
    batch=st.integers(1, 3), sized=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip


@settings(deadline=None)
@any_merge
def test_graphs_do_what_torch_does(
    patches: int, prefix: int, share: float, batch: int, sized: bool, seed: int
):
    tokens, remove = prefix + patches, round(share * (patches // 2))
    keys, x, size = draw(batch, tokens, seed)
    assume(margin(keys, remove, prefix) > 1e-6)
    found = run(write(tokens, remove, prefix, sized=sized), keys, x, *[size] * sized)

    matching = reference.match(torch.from_numpy(keys).mean(dim=1), remove, prefix)
    sizes = torch.from_numpy(size) if sized else torch.ones(batch, tokens, 1)
    merged, total = reference.merge(matching, torch.from_numpy(x), sizes)
    back = reference.unmerge(matching, merged)
    assert found["map"].dtype == np.int64
    assert np.array_equal(found["map"], reference.token_map(matching).numpy())
    assert np.array_equal(found["size"], total.numpy())
    np.testing.assert_allclose(found["merged"], merged.numpy(), rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(found["back"], back.numpy(), rtol=1e-6, atol=1e-4)


@settings(deadline=None)
@any_merge
def test_unmerging_copies_a_token_to_all_that_went_into_it(
    patches: int, prefix: int, share: float, batch: int, sized: bool, seed: int
):
    tokens, remove = prefix + patches, round(share * (patches // 2))
    keys, x, size = draw(batch, tokens, seed)
    model = write(tokens, remove, prefix, sized=sized)
    found = run(model, keys, x, *[size] * sized)
    copies = np.take_along_axis(found["merged"], found["map"][..., None], axis=1)
    assert np.array_equal(found["back"], copies)
    # Tokens that are equal where they merge are given back as they were.
    equal = np.take_along_axis(x[:, : tokens - remove], found["map"][..., None], axis=1)
    again = run(model, keys, equal, *[size] * sized)
    assert np.array_equal(again["map"], found["map"])
    assert np.array_equal(again["back"], equal)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_matching_nothing_moves_set_b_behind_set_a(prefix: int):
    keys, x, _ = draw(2, prefix + 9, 0)
    found = run(write(prefix + 9, 0, prefix, sized=False), keys, x)
    a, b = prefix + prefix % 2, prefix + 1 - prefix % 2
    moved = np.concatenate([x[:, :prefix], x[:, a::2], x[:, b::2]], axis=1)
    assert np.array_equal(found["merged"], moved)
    assert np.array_equal(found["back"], x)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("tokens", "remove", "prefix"), [(197, 16, 1), (198, 98, 2), (576, 99, 0)])
def test_images_of_real_size(precision: Precision, tokens: int, remove: int, prefix: int):
    """Similarities are ranked in float32 in any precision, and positions are whole numbers."""
    dtype = TYPES[precision].stream.numpy()
    keys, x, size = (array.astype(dtype) for array in draw(2, tokens, 3))
    assert margin(keys, remove, prefix) > 1e-6  # or the map may differ
    found = run(write(tokens, remove, prefix, precision), keys, x, size)
    metric = torch.from_numpy(keys.astype(np.float32)).mean(dim=1)
    places = reference.token_map(reference.match(metric, remove, prefix)).numpy()
    assert np.array_equal(found["map"], places)
    copies = np.take_along_axis(found["merged"], places[..., None], axis=1)
    assert np.array_equal(found["back"], copies)


def test_each_part_is_a_few_nodes_that_all_runtimes_have():
    model = write(50, 8, 1)
    onnx.checker.check_model(model, full_check=True)
    nodes = Counter(node.name.partition("/")[0] for node in model.graph.node)
    assert nodes["matching"] + nodes["merging"] <= 31
    assert nodes["unmerging"] <= 6
    assert nodes["map"] <= 6
    first = Counter(n.name.partition("/")[0] for n in write(50, 8, 1, sized=False).graph.node)
    assert first["matching"] + first["merging"] <= 28
    wide = {t.data_type for t in model.graph.initializer} - {onnx.TensorProto.FLOAT}
    assert wide == {onnx.TensorProto.INT64}  # NumPy's own whole numbers are int32 on Windows
    operators = {node.op_type for node in model.graph.node}
    assert operators.isdisjoint({"ScatterElements", "ScatterND", "NonZero", "Compress", "Loop"})


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("remove", [0, 1, 16, 98])
def test_nvidia_s_parser_takes_them(precision: Precision, remove: int, tmp_path: Path):
    trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    onnx.save(write(197, remove, 1, precision), tmp_path / "graph.onnx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    done = parser.parse_from_file(str(tmp_path / "graph.onnx"))
    assert done, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert network.get_output(3).dtype == trt.int64
    if remove == 16:
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for entry in map(network.get_input, range(network.num_inputs)):
            shape = tuple(entry.shape)[1:]
            profile.set_shape(entry.name, *((batch, *shape) for batch in (1, 2, 4)))
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None

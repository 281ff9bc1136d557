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


def run_in_openvino(model: onnx.ModelProto, *arrays: Array) -> dict[str, Array]:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    opened = core.read_model(model.SerializeToString())
    compiled = core.compile_model(opened, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(arrays)
    return {name: np.asarray(found[name]) for name in OUTPUTS}


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


def hard_keys(kind: str, tokens: int, prefix: int) -> Array:
    """Keys of three images, of which some or all have no direction."""
    keys = draw(3, tokens, 5)[0]
    first_b = prefix + 1 - prefix % 2
    if kind == "one zero in set B":
        keys[:, :, first_b + 2] = 0
    elif kind == "one zero in set A":
        keys[:, :, first_b + 3] = 0
    elif kind == "zero prefix":
        keys[:, :, :prefix] = 0
    elif kind == "half zero":
        keys[:, :, prefix + (tokens - prefix) // 2 :] = 0
    elif kind == "zero":
        keys[:] = 0
    elif kind == "heads that cancel":
        keys[:, 1] = -keys[:, 0]
    elif kind == "constant":
        keys[:] = 0.3
    else:
        keys *= np.float32(kind)
    return keys


HARD = (
    "one zero in set B", "one zero in set A", "zero prefix", "half zero", "zero",
    "heads that cancel", "constant", "1e30", "1e17", "1e-17", "1e-30", "1e-44",
)  # fmt: skip


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("run", [run, run_in_openvino])
def test_keys_without_a_direction(kind: str, prefix: int, run: Any):
    """Both sides merge the same tokens: ties go by position."""
    for patches, remove in ((20, 3), (21, 10), (64, 16)):
        tokens = prefix + patches
        keys = hard_keys(kind, tokens, prefix)
        x, size = draw(3, tokens, 0)[1:]
        found = run(write(tokens, remove, prefix), keys, x, size)
        matching = reference.match(torch.from_numpy(keys).mean(dim=1), remove, prefix)
        places = reference.token_map(matching).numpy()
        assert np.array_equal(found["map"], places)
        check_map(places, remove, prefix)
        merged = reference.merge(matching, torch.from_numpy(x), torch.from_numpy(size))[0]
        np.testing.assert_allclose(found["merged"], merged.numpy(), rtol=1e-6, atol=1e-4)
        assert np.array_equal(found["merged"][:, :prefix], x[:, :prefix])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_prefix_and_set_b_are_safe_from_keys_that_are_no_numbers(value: float, prefix: int):
    tokens, remove = prefix + 21, 8
    for where in (slice(None), slice(prefix + 4, prefix + 9), slice(0, prefix)):
        keys, x, size = draw(2, tokens, 1)
        keys[:, :, where] = value
        found = run(write(tokens, remove, prefix), keys, x, size)
        check_map(found["map"], remove, prefix)
        metric = torch.from_numpy(keys).mean(dim=1)
        check_map(
            reference.token_map(reference.match(metric, remove, prefix)).numpy(), remove, prefix
        )


def check_map(places: Array, remove: int, prefix: int) -> None:
    """Prefix tokens stay alone in their places, set B behind all; others go there or stay."""
    tokens = places.shape[1]
    left, first_a, first_b = tokens - remove, prefix + prefix % 2, prefix + 1 - prefix % 2
    b = np.arange(first_b, tokens, 2)
    for image in places:
        assert image[:prefix].tolist() == list(range(prefix))
        assert image[prefix:].min() >= prefix
        assert image[b].tolist() == list(range(left - len(b), left))
        a = image[first_a::2]
        assert sorted(a[a < left - len(b)]) == list(range(prefix, left - len(b)))


def test_each_part_is_a_few_nodes_that_all_runtimes_have():
    model = write(50, 8, 1)
    onnx.checker.check_model(model, full_check=True)
    nodes = Counter(node.name.partition("/")[0] for node in model.graph.node)
    assert nodes["matching"] + nodes["merging"] <= 32
    assert nodes["unmerging"] <= 6
    assert nodes["map"] <= 6
    first = Counter(n.name.partition("/")[0] for n in write(50, 8, 1, sized=False).graph.node)
    assert first["matching"] + first["merging"] <= 29
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

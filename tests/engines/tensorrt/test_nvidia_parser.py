"""NVIDIA's own ONNX parser, on the CPU: what a refit needs of a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule
from tocom_export.engines.tensorrt.building import PlanOptions, _configure
from tocom_export.engines.tensorrt.library import open_library
from tocom_export.engines.tensorrt.refitter import _TYPES
from tocom_export.graph.precision import TYPES
from tocom_export.graph.quantising import quantized_layers, stored_form
from tocom_export.graph.writer import write_graph
from tocom_export.io.tensors import read_header
from tocom_export.model.catalogue import known_model
from tocom_export.model.spec import VitSpec
from tocom_export.model.weight_names import qkv_weights

trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)

SPECS: dict[str, Callable[[], VitSpec]] = {
    "deit_tiny_patch16_224": lambda: known_model("deit_tiny_patch16_224")[0],
    "deit_tiny_distilled_patch16_224": lambda: known_model("deit_tiny_distilled_patch16_224")[0],
    "layer scale, registers": lambda: known_model("vit_small_patch14_reg4_dinov2")[0],
    "adapters": lambda: dataclasses.replace(
        known_model("deit_tiny_patch16_224")[0], adapter_width=32
    ),
}
FAMILIES = (
    "vit_base_patch16_siglip_224", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3",
    "eva02_tiny_patch14_224", "eva02_base_patch14_224", "vit_small_patch16_rope_mixed_224",
    "vit_pe_core_tiny_patch16_384", "beit3_base_patch16_224", "aimv2_large_patch14_224",
    "beit_base_patch16_224", "vit_relpos_base_patch16_cls_224", "vit_srelpos_small_patch16_224",
    "vit_relpos_small_patch16_rpn_224", "vit_base_patch16_sapiens2", "test_vit3",
)  # fmt: skip
PER_LAYER = (40, 0, 20, 17, 1, 3, 0, 0, 5, 2, 0, 9)
"""A degree of its own for each of the twelve layers."""


@pytest.fixture(scope="module")
def logger() -> Any:
    return trt.Logger(trt.Logger.ERROR)


def parsed(file: Path, logger: Any) -> tuple[Any, Any]:
    """The network of a graph, and what must stay alive beside it."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    done = parser.parse_from_file(str(file))
    assert done, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return network, (builder, parser)


@pytest.mark.parametrize("model", SPECS)
@pytest.mark.parametrize("method", ["tome", "evit"])
@pytest.mark.parametrize("degree", [0, 4, 16, PER_LAYER], ids=str)
def test_every_weight_can_be_refitted(
    model: str,
    method: Any,
    degree: int | tuple[int, ...],
    make_weights: Callable[..., dict[str, Any]],
    tmp_path: Path,
    logger: Any,
):
    spec = SPECS[model]()
    save_file(make_weights(spec), tmp_path / "weights.safetensors")
    stored, _ = read_header(tmp_path / "weights.safetensors")
    graph = write_graph(spec, Schedule.of(spec, degree), Method(method), stored, {})
    ir.save(graph, tmp_path / "graph.onnx")

    network, _alive = parsed(tmp_path / "graph.onnx", logger)

    names = spec.weights()
    assert [name for name in names if not network.mark_weights_refittable(name)] == []
    assert not network.mark_weights_refittable("no such weight")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("degree", [0, 4])
@pytest.mark.parametrize("model", FAMILIES)
def test_every_family_is_parsed_and_its_queries_keys_and_values_refitted(
    model: str,
    degree: int,
    precision: Any,
    make_weights: Callable[..., dict[str, Any]],
    tmp_path: Path,
    logger: Any,
):
    spec = dataclasses.replace(known_model(model)[0], depth=2)
    save_file(stored_form(make_weights(spec), precision, ()), tmp_path / "weights.safetensors")
    stored, _ = read_header(tmp_path / "weights.safetensors")
    schedule = Schedule.of(spec, degree)
    graph = write_graph(spec, schedule, Method("tome"), stored, {}, TYPES[precision])
    ir.save(graph, tmp_path / "graph.onnx")
    network, _alive = parsed(tmp_path / "graph.onnx", logger)
    assert [name for name in qkv_weights(spec) if not network.mark_weights_refittable(name)] == []


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("method", ["tome", "evit"])
@pytest.mark.parametrize("degree", [0, 4, 8, 16, PER_LAYER], ids=str)
def test_typed_graphs(
    precision: Any,
    method: Any,
    degree: int | tuple[int, ...],
    make_weights: Callable[..., dict[str, Any]],
    tmp_path: Path,
    logger: Any,
):
    """DeiT tiny in each precision: parsed, the weights of its own type, all of them markable."""
    spec = known_model("deit_tiny_patch16_224")[0]
    layers = quantized_layers(spec)
    save_file(stored_form(make_weights(spec), precision, layers), tmp_path / "weights.safetensors")
    stored, _ = read_header(tmp_path / "weights.safetensors")
    scales = dict.fromkeys(layers, 0.05) if precision == "int8" else None
    schedule = Schedule.of(spec, degree)
    graph = write_graph(spec, schedule, Method(method), stored, {}, TYPES[precision], scales)
    ir.save(graph, tmp_path / "graph.onnx")

    network, _alive = parsed(tmp_path / "graph.onnx", logger)

    assert [name for name in stored if not network.mark_weights_refittable(name)] == []
    # What a plan that takes its weights back may ask for beside them.
    inline = [
        value.const_value
        for value in graph.graph.initializers.values()
        if not isinstance(value.const_value, ir.ExternalTensor)
    ]
    asked = [tensor for tensor in inline if network.mark_weights_refittable(tensor.name)]
    assert {tensor.numpy().dtype.name for tensor in asked} <= _TYPES.keys()
    assert asked
    assert network.get_input(0).dtype == network.get_output(0).dtype == trt.float32
    computed = {"fp16": trt.float16, "bf16": trt.bfloat16, "int8": trt.float32}[precision]
    products = [
        layer.get_output(0).dtype
        for layer in map(network.get_layer, range(network.num_layers))
        if layer.type == trt.LayerType.MATRIX_MULTIPLY
    ]
    # Similarities are float32 in any precision: one product in each layer that merges.
    merges = sum(map(bool, schedule.removed)) if method == "tome" else 0
    assert products.count(computed) >= 6 * spec.depth
    assert sum(dtype != computed for dtype in products) <= 3 * merges


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_each_output_is_there_under_its_name(
    precision: Any, make_weights: Callable[..., dict[str, Any]], tmp_path: Path, logger: Any
):
    """Without logits the heads' weights are none of the network's."""
    spec = dataclasses.replace(known_model("deit_tiny_distilled_patch16_224")[0], depth=1)
    save_file(stored_form(make_weights(spec), precision, ()), tmp_path / "weights.safetensors")
    stored, _ = read_header(tmp_path / "weights.safetensors")
    schedule, given = Schedule.of(spec, 8), (Method("tome"), stored, {}, TYPES[precision])
    for names in (("embedding", "logits"), ("embedding",)):
        graph = write_graph(spec, schedule, *given, outputs=names, unit_embedding=True)
        ir.save(graph, tmp_path / "graph.onnx")
        network, _alive = parsed(tmp_path / "graph.onnx", logger)
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        assert tuple(output.name for output in outputs) == names
        widths = {"embedding": spec.width, "logits": spec.classes}
        assert [tuple(o.shape) for o in outputs] == [(-1, widths[name]) for name in names]
        assert {output.dtype for output in outputs} == {trt.float32}
        assert network.mark_weights_refittable("head_dist.weight") is ("logits" in names)


@pytest.mark.parametrize(
    "refit, flags",
    [
        ("none", ()), ("qkv", ("REFIT_INDIVIDUAL",)), ("all", ("REFIT_INDIVIDUAL",)),
        ("identical", ("REFIT_IDENTICAL", "STRIP_PLAN")),
    ],
)  # fmt: skip
def test_the_flags_of_each_form(refit: Any, flags: tuple[str, ...], bundle: Bundle, logger: Any):
    """As NVIDIA's own configuration has them in the end: one flag may clear another."""
    nvidia = open_library("tensorrt-rtx")
    options = PlanOptions(refit, detailed=True)
    config, named = _configure(nvidia, trt.Builder(logger), bundle, options)
    known = trt.BuilderFlag.__members__
    assert named == flags
    assert {name for name, flag in known.items() if config.get_flag(flag)} == {*flags}
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_a_shallow_model_builds(
    precision: Any, make_weights: Callable[..., dict[str, Any]], tmp_path: Path, logger: Any
):
    spec = dataclasses.replace(known_model("deit_tiny_patch16_224")[0], depth=1)
    layers = quantized_layers(spec)
    save_file(stored_form(make_weights(spec), precision, layers), tmp_path / "weights.safetensors")
    stored, _ = read_header(tmp_path / "weights.safetensors")
    scales = dict.fromkeys(layers, 0.05) if precision == "int8" else None
    schedule = Schedule.of(spec, 16)
    graph = write_graph(spec, schedule, Method("tome"), stored, {}, TYPES[precision], scales)
    ir.save(graph, tmp_path / "graph.onnx")
    network, (builder, _parser) = parsed(tmp_path / "graph.onnx", logger)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *((batch, 3, 224, 224) for batch in (1, 2, 4)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    assert plan.nbytes > 100_000

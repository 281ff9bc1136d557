"""Engines of each precision held against the float32 model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file

from tocom_export.bundle.manifest import MANIFEST
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.method import Method
from tocom_export.engines.onnx.bfloat16 import widen
from tocom_export.engines.onnx.calibration import measure_input_scales
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.verify import TOLERANCES, sample_images, verify
from tocom_export.errors import BundleError, CheckpointError
from tocom_export.graph.quantising import quantized_layers
from tocom_export.training.torch_engine import load_model, make_oracle, make_runner

NAMES = ["r00", "r08", "r16", "fast"]


@pytest.fixture(scope="module")
def named(
    tmp_path_factory: pytest.TempPathFactory, make_blueprint: Callable[..., Blueprint]
) -> Blueprint:
    """r00, r08, r16, and ``fast``, whose degree is another in each layer."""
    folder = tmp_path_factory.mktemp("blueprint")
    return make_blueprint(folder, schedules={"fast": (20, 3, 0, 7)})


def build(blueprint: Blueprint, precision: Any, out: Path) -> Bundle:
    images = sample_images(blueprint.weights.spec, 64, seed=1)
    return write_bundle(
        dataclasses.replace(
            blueprint, weights=dataclasses.replace(blueprint.weights, precision=precision)
        ),
        out,
        calibrate=lambda bundle, variant: measure_input_scales(bundle, variant.name, images),
    )


@pytest.fixture(scope="module", params=["fp16", "bf16", "int8"])
def typed(
    request: pytest.FixtureRequest,
    named: Blueprint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    return build(named, request.param, tmp_path_factory.mktemp("typed") / request.param)


def rounding(engine: OnnxEngine, model: Callable[..., Any], images: Any) -> np.ndarray:
    """Largest difference of each image's logits, over the largest logit."""
    wanted = model(images)
    difference: np.ndarray = np.abs(engine.run(images) - wanted).max(axis=1) / np.abs(wanted).max()
    return difference


@pytest.mark.parametrize("name", NAMES)
def test_engines_say_what_the_float32_model_says(typed: Bundle, named: Blueprint, name: str):
    weights = named.weights
    images = sample_images(weights.spec, 40)
    model = load_model(weights.spec, weights.checkpoint.tensors, named.method)
    engine = OnnxEngine(typed, name, compensated=False)
    differs = rounding(engine, make_runner(model, engine.variant.degrees), images)
    typical = {"fp16": 2e-3, "bf16": 2e-2, "int8": 6e-2}[typed.precision]
    assert typical / 100 < np.median(differs) < typical
    if name == "r00":  # nothing is merged, so nothing can be merged otherwise
        assert differs.max() < 2 * typical


def test_the_check_passes_and_finds_a_wrong_weight(
    typed: Bundle, named: Blueprint, tmp_path: Path, revise: Callable[..., Blueprint]
):
    images = sample_images(typed.spec, 20)
    found = list(verify(typed, images, make_oracle(typed, named.weights.bank)))
    assert [c.variant for c in found] == NAMES
    assert [c.passed for c in found] == [True] * 4
    assert {c.precision for c in found} == {typed.precision}
    other = build(revise(named, scale=1.0), typed.precision, tmp_path / "other")
    found = list(verify(other, images, make_oracle(typed)))
    assert [c.passed for c in found] == [True, False, False, False]


def test_weights_are_smaller_and_keep_their_names(typed: Bundle, named: Blueprint):
    stored = load_file(typed.path / "weights.safetensors")
    assert set(named.weights.spec.weights()) <= set(stored)
    size = sum(tensor.nbytes for tensor in stored.values())
    whole = sum(4 * tensor.size for tensor in named.weights.checkpoint.tensors.values())
    assert size < (0.6 if typed.precision == "int8" else 0.51) * whole
    assert Bundle.open(typed.path, hashes=True).precision == typed.precision


def test_graphs_are_valid(typed: Bundle):
    for name in NAMES:
        onnx.checker.check_model(str(typed.graph(name)), full_check=True)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True, "layer_scale": True}, {"distilled": True}, {"adapter_width": 8},
        {"pool": "avg", "final_norm": "fc_norm"}, {"classes": 0}, {"pre_norm": True},
        {"registers": 4, "prefix_positions": False}, {"activation": "gelu_tanh"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", ["tome", "evit"])
def test_every_part_of_a_model_has_a_typed_form(
    make_blueprint: Callable[..., Blueprint], make_spec: Any, make_bank: Any, tmp_path: Path,
    precision: Any, changes: dict[str, Any], method: Any,
):  # fmt: skip
    spec = make_spec(depth=2, **changes)
    blueprint = make_blueprint(
        tmp_path, spec, bank=None, method=Method(method), targets=(0, 8),
        schedules={"fast": (20, 3)},
    )  # fmt: skip
    bundle = build(blueprint, precision, tmp_path / "bundle")
    model = load_model(bundle.spec, blueprint.weights.checkpoint.tensors, blueprint.method)
    for name, variant in bundle.variants.items():
        onnx.checker.check_model(str(bundle.graph(name)), full_check=True)
        run = make_runner(model, variant.degrees)
        differs = rounding(OnnxEngine(bundle, name), run, sample_images(spec))
        assert np.median(differs) < TOLERANCES[precision]


def test_bfloat16_is_rounded_after_every_operator(tmp_path: Path, named: Blueprint):
    bundle = build(named, "bf16", tmp_path / "bundle")
    model = onnx.load(bundle.graph(8), load_external_data=False)
    widen(model)
    narrow = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.BFLOAT16}
    assert not {"Gemm", "MatMul", "Conv", "Add", "Mul"} & {
        node.op_type
        for node in model.graph.node
        for name in node.input
        if name in narrow
    }  # fmt: skip
    narrowing = [
        node for node in model.graph.node
        if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.BFLOAT16
    ]  # fmt: skip
    assert len(narrowing) > 10 * named.weights.spec.depth


def test_int8_multiplies_integers(tmp_path: Path, named: Blueprint):
    bundle = build(named, "int8", tmp_path / "bundle")
    model = onnx.load(bundle.graph(8), load_external_data=False)
    count = len(quantized_layers(named.weights.spec))
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (count, 2 * count)
    scales = {t.name for t in model.graph.initializer if t.name.endswith(".input_scale")}
    assert scales == {f"{layer}.input_scale" for layer in quantized_layers(named.weights.spec)}


@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_fuses_every_int8_product(tmp_path: Path, named: Blueprint, name: str):
    bundle = build(named, "int8", tmp_path / "bundle")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it says that the file is for this machine alone
    onnxruntime.InferenceSession(bundle.graph(name), options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QGemm") == len(quantized_layers(named.weights.spec))
    assert kinds.count("DequantizeLinear") == 0


def test_int8_without_images_finds_ranges_at_each_run(tmp_path: Path, named: Blueprint):
    weights = dataclasses.replace(named.weights, precision="int8")
    bundle = write_bundle(dataclasses.replace(named, weights=weights), tmp_path / "bundle")
    optimised = tmp_path / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 3
    onnxruntime.InferenceSession(bundle.graph(8), options, providers=["CPUExecutionProvider"])
    model = onnx.load(optimised, load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DynamicQuantizeMatMul") == len(quantized_layers(named.weights.spec))
    images = sample_images(weights.spec, 40)
    exact = load_model(weights.spec, named.weights.checkpoint.tensors, named.method)
    for name in NAMES:
        engine = OnnxEngine(bundle, name, compensated=False)
        differs = rounding(engine, make_runner(exact, engine.variant.degrees), images)
        assert 6e-4 < np.median(differs) < 6e-2
    found = verify(bundle, images, make_oracle(bundle, named.weights.bank))
    assert all(comparison.passed for comparison in found)


def test_input_scales_follow_the_images(bundle: Bundle):
    images = sample_images(bundle.spec, 64)
    scales = measure_input_scales(bundle, "r08", images)
    assert list(scales) == quantized_layers(bundle.spec)
    assert all(0 < scale < 1 for scale in scales.values())
    assert measure_input_scales(bundle, "r08", images) == scales
    assert (
        measure_input_scales(bundle, "r08", images, 1.0)["blocks.1.mlp.fc2"]
        > scales["blocks.1.mlp.fc2"]
    )


def test_weights_that_fp16_can_t_hold(
    named: Blueprint, tmp_path: Path, revise: Callable[..., Blueprint]
):
    tensors = dict(named.weights.checkpoint.tensors)
    tensors["norm.weight"] = tensors["norm.weight"] * 1e6
    large = dataclasses.replace(named.weights.checkpoint, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"norm\.weight has values beyond"):
        build(revise(named, checkpoint=large), "fp16", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_manifest_of_an_unknown_precision(fresh: Bundle):
    file = fresh.path / MANIFEST
    file.write_text(file.read_text().replace('"fp32"', '"fp8"'))
    with pytest.raises(BundleError, match=r"precision: .*'fp8'"):
        Bundle.open(fresh.path)

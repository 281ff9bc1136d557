"""Features of each patch, and where it went: engines against the model, merge by merge undone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tocom_export.bundle.manifest import Manifest
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.method import Method
from tocom_export.compression.rules import list_degrees
from tocom_export.engines.differences import find_firsts, measure
from tocom_export.engines.onnx.calibration import measure_input_scales
from tocom_export.engines.serving.pool import EnginePool
from tocom_export.engines.serving.triton import write_repository
from tocom_export.engines.serving.triton_options import TritonOptions
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tracing import Tracer
from tocom_export.engines.verify import compare, sample_images, verify
from tocom_export.errors import CheckFailed, InputError
from tocom_export.preparing import prepare
from tocom_export.training.building import vit_from_spec
from tocom_export.training.matching import unmerge
from tocom_export.training.model import CompressedVit
from tocom_export.training.torch_engine import load_model, make_oracle

NO_CLASS = {"class_token": False, "pool": "avg"}
KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "token, fc_norm": {"final_norm": "fc_norm"},
    "average": {"pool": "avg"},
    "average, fc_norm": {"pool": "avg", "final_norm": "fc_norm"},
    "no class token, no norm": {**NO_CLASS, "final_norm": None},
    "map": {"class_token": False, "pool": "map", "pool_heads": 4, "pool_mlp_width": 128},
    "token and average, registers": {"pool": "token_avg", "registers": 4},
    "distilled": {"distilled": True},
    "no head": {"classes": 0},
    "projection": {"classes": 0, "projection": 24, "head_bias": False, "pre_norm": True},
}
DENSE: Any = ("tokens", "map")
RUNTIMES: dict[str, dict[str, Any]] = {
    "onnx": {"threads": 1},
    "openvino": {"backend": "openvino", "inference_precision": "f32", "threads": 1},
}
MIXED = (9, 0, 7, 3)
Make = Callable[..., Bundle]
Array = np.ndarray[Any, Any]


@pytest.fixture
def make(make_blueprint: Callable[..., Blueprint], make_spec: Any, tmp_path: Path) -> Make:
    """A bundle of a small model that gives tokens and a map beside what it is for."""

    def call(
        changes: dict[str, Any] | None = None,
        outputs: Any = None,
        name: str = "bundle",
        **more: Any,
    ) -> Bundle:
        spec = make_spec(**(changes or {}))
        usual = "logits" if spec.classes else "embedding"
        wanted = {"bank": None, "targets": (0, 8), "schedules": {"mixed": MIXED}, **more}
        made = make_blueprint(tmp_path, spec, **wanted)
        return write_bundle(
            dataclasses.replace(made, outputs=outputs or (*DENSE, usual)), tmp_path / name
        )

    return call


@torch.inference_mode()
def undo(bundle: Bundle, name: str, images: Array) -> dict[str, Array]:
    """Tokens and map of the model, its merges undone one by one from the last to the first."""
    model = load_model(bundle.spec, bundle.tensors(name), bundle.method)
    matchings: list[Any] = []
    match = model.match

    def note(*given: Any) -> Any:
        matchings.append(match(*given))
        return matchings[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "match", note, raising=False)
        x = model.features(torch.from_numpy(images), bundle.variant(name).degrees)[0]
    places = torch.arange(x.shape[1]).expand(len(x), -1)[..., None]
    for matching in reversed(matchings):
        x, places = unmerge(matching, x), unmerge(matching, places)
    first = bundle.spec.prefix
    found = {"tokens": x[:, first:].numpy(), "map": places[:, first:, 0].numpy() - first}
    return {"tokens": found["tokens"], "map": found["map"].astype(np.int32)}


def differ(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def check(bundle: Bundle, images: Array, runtime: str) -> None:
    """Each variant in a runtime, against the merges that are undone and against ``give``."""
    oracle = make_oracle(bundle)
    for name, variant in bundle.variants.items():
        found = bundle.engine(name, **RUNTIMES[runtime]).run_all(images)
        assert tuple(found) == bundle.outputs
        for output, array in found.items():
            shape = (len(images), *bundle.forms[output].shape)
            assert (array.dtype, array.shape) == (bundle.forms[output].dtype, shape)
        given, undone = oracle.run_all(variant, images), undo(bundle, name, images)
        np.testing.assert_array_equal(given["map"], undone["map"])
        np.testing.assert_array_equal(given["tokens"], undone["tokens"])
        np.testing.assert_array_equal(found["map"], undone["map"])
        assert differ(found["tokens"], undone["tokens"]) < 1e-4, name
        left = variant.schedule(bundle.spec).tokens_out[-1] - bundle.spec.prefix
        for row, of in zip(found["map"], found["tokens"], strict=True):
            assert set(row.tolist()) == set(range(left))
            for place in range(left):  # those that went together are the same to the last bit
                assert (of[row == place] == of[row == place][0]).all()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_patch_has_its_token(make: Make, kind: str, runtime: str):
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    bundle = make(KINDS[kind])
    check(bundle, sample_images(bundle.spec, 3), runtime)


@pytest.mark.parametrize("kind", KINDS)
def test_without_merging_they_are_timm_s(make: Make, kind: str):
    bundle = make(KINDS[kind], targets=(0,), schedules={})
    images = sample_images(bundle.spec, 2)
    vit: Any = vit_from_spec(bundle.spec)
    vit.load_state_dict({n: torch.from_numpy(np.array(t)) for n, t in bundle.tensors(0).items()})
    with torch.inference_mode():
        wanted = vit.eval().forward_features(torch.from_numpy(images))[:, bundle.spec.prefix :]
    found = bundle.engine(0, threads=1).run_all(images)
    assert differ(found["tokens"], wanted.numpy()) < 1e-5
    np.testing.assert_array_equal(found["map"], [np.arange(bundle.spec.patches)] * 2)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("side", [64, 128, 256])
def test_from_64_to_1024_patches(make: Make, make_spec: Any, side: int, runtime: str):
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    changes = {"image_size": (side, side)}
    half = list_degrees(make_spec(**changes), "keep:0.5")
    schedules = {"half": half, "uneven": (31, 0, 16, 2)}
    bundle = make(changes, targets=(0, 16), schedules=schedules)
    assert bundle.spec.patches == side * side // 64
    check(bundle, sample_images(bundle.spec, 2), runtime)


def test_images_of_512_pixels(make: Make):
    """By 16: 1,024 patches, and a side that is not the other."""
    for size in ((512, 512), (512, 96)):
        changes = {"image_size": size, "patch_size": (16, 16)}
        bundle = make(changes, name=str(size), targets=(100,), schedules={})
        assert bundle.spec.patches == size[0] * size[1] // 256
        check(bundle, sample_images(bundle.spec, 2), "onnx")


def test_compensated_weights(make: Make, make_bank: Any, make_spec: Any):
    bank = make_bank(make_spec())
    bundle = make({}, bank=bank)
    images = sample_images(bundle.spec)
    for found in verify(bundle, images, make_oracle(bundle, bank).run_all, threads=1):
        assert found.passed, found


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_other_precisions(
    make: Make, make_blueprint: Any, make_spec: Any, tmp_path: Path, precision: Any
):
    changes = {"image_size": (128, 128)}
    images = sample_images(make_spec(**changes), 32)
    more: dict[str, Any] = {"bank": None, "targets": (16,), "precision": precision}
    made = make_blueprint(tmp_path, make_spec(**changes), **more)
    made = dataclasses.replace(made, outputs=(*DENSE, "logits"))
    scales = None
    if precision == "int8":
        scales = lambda b, v: measure_input_scales(b, v.name, images)  # noqa: E731
    bundle = write_bundle(made, tmp_path / precision, calibrate=scales)
    oracle = make_oracle(bundle)
    for runtime in RUNTIMES:
        if runtime == "openvino":
            pytest.importorskip("openvino")
        (found,) = verify(bundle, images[:20], oracle.run_all, backend=runtime)
        assert found.passed, (runtime, found)
        given = bundle.engine(16, **RUNTIMES[runtime]).run_all(images[:2])
        assert [given[name].dtype for name in DENSE] == [np.float32, np.int32]

    def shift(variant: Any, images: Any) -> Any:
        """Features of the patch beside, and a map of it."""
        given = oracle.run_all(variant, images)
        return given | {name: np.roll(given[name], 1, axis=1) for name in DENSE}

    (found,) = verify(bundle, images[:20], shift, threads=1)
    assert not found.passed
    assert found.output in DENSE


@pytest.mark.parametrize(
    "outputs", [("tokens",), DENSE, ("map", "embedding"), ("logits", "tokens")]
)
@pytest.mark.parametrize("kind", ["average, fc_norm", "map", "token"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_graphs_read_what_they_need(
    make: Make, make_weights: Any, kind: str, outputs: Any, runtime: str
):
    """And nothing else: heads and pooling are left out where nobody asks for what they make."""
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    bundle = make(KINDS[kind], outputs, targets=(8,), schedules={})
    graph = onnx.load(bundle.graph(8), load_external_data=False).graph
    held = {t.name for t in graph.initializer} & bundle.spec.weights().keys()
    assert held == {name for name in bundle.spec.weights() if bundle.reads(name)}
    images, new = sample_images(bundle.spec, 2), make_weights(bundle.spec, 4)
    engine = bundle.engine(8, **RUNTIMES[runtime])
    engine.refit(new)
    model = load_model(bundle.spec, new, bundle.method)
    with torch.inference_mode():
        wanted = model.give(torch.from_numpy(images), outputs, 8)
    for name, array in engine.run_all(images).items():
        assert differ(array, wanted[name].numpy()) < 1e-4, name


def test_what_other_outputs_are_stays(make: Make):
    plain, dense = make({}, ("logits",), "plain"), make()
    images = sample_images(plain.spec, 3)
    for name in plain.variants:
        found = dense.engine(name, threads=1).run_all(images)["logits"]
        np.testing.assert_allclose(found, plain.engine(name, threads=1).run(images), atol=1e-5)
    nodes = {
        node.op_type for node in onnx.load(dense.graph(8), load_external_data=False).graph.node
    }
    assert nodes.isdisjoint({"ScatterElements", "ScatterND", "NonZero", "Compress", "Loop"})


def test_what_a_trace_gives_beside_them(make: Make):
    bundle = make(KINDS["distilled"])
    images = sample_images(bundle.spec, 2)
    for name in bundle.variants:
        trace, found = Tracer(bundle, name).run(images), bundle.engine(name).run_all(images)
        np.testing.assert_array_equal(trace.maps[:, -1], found["map"])
        np.testing.assert_allclose(trace.outputs["tokens"], found["tokens"], atol=1e-5)


def test_pruned_patches_went_nowhere(make: Make):
    bundle = make({}, ("logits", "map"), method=Method("evit"))
    images = sample_images(bundle.spec, 3)
    oracle = make_oracle(bundle)
    for name, variant in bundle.variants.items():
        found, trace = bundle.engine(name).run_all(images), Tracer(bundle, name).run(images)
        np.testing.assert_array_equal(found["map"], oracle.run_all(variant, images)["map"])
        np.testing.assert_array_equal(found["map"], trace.maps[:, -1])
        gone = sum(variant.schedule(bundle.spec).removed)
        assert ((found["map"] == -1).sum(axis=1) == gone).all()


def test_what_can_t_be_given(make: Make, make_vit: Any, make_spec: Any):
    says = "`outputs` tokens: evit drops patches, of which no features are left"
    with pytest.raises(InputError, match=says):
        prepare(outputs=("tokens",), method="evit", bank="none")
    with pytest.raises(InputError, match=says):
        make({}, method=Method("evit"))
    model = CompressedVit(make_vit(make_spec()), Method("evit"))
    with pytest.raises(InputError, match=says):
        model.give(torch.zeros(1, 3, 56, 56), ("tokens",))
    with pytest.raises(InputError, match="`outputs` map alone: ask for what else"):
        prepare(outputs="map", bank="none")
    fields = {f.name for f in dataclasses.fields(Manifest)}
    data = {k: v for k, v in vars(make({}, ("logits",))).items() if k in fields}
    with pytest.raises(InputError, match=says):
        Manifest(**{**data, "outputs": ("tokens",), "method": Method("evit")})


# How they are judged


def test_a_map_is_the_same_or_isn_t():
    images = np.zeros((20, 1), np.float32)
    right = np.tile(np.arange(6, dtype=np.int32), (20, 1))
    values: Any = ("r08.onnx", "r08", "fp32")
    for wrong, passed in ((0, True), (1, True), (2, False)):
        given = right.copy()
        given[:wrong, 2] = 3
        for atol in (None, 1.0):
            found = compare(
                lambda _, g=given: {"map": g}, images, lambda _: {"map": right}, *values,
                outputs=("map",), atol=atol, batch=20,
            )  # fmt: skip
            assert (found.beyond, found.tolerance) == (wrong, 0)
            assert found.passed is (passed if atol is None else wrong == 0)
    with pytest.raises(CheckFailed, match=r"differs from x on 2 of 20 images \(max \|Δ\| of maps"):
        dataclasses.replace(found, strict=False).require("x", "y")


def test_the_patch_in_the_middle_decides_in_fewer_digits():
    wanted = np.array([[0, 1, 2, 2, 0, 3]], np.int32)
    assert find_firsts(wanted).tolist() == [[0, 1, 2, 2, 0, 5]]
    renumbered = np.array([[1, 2, 3, 3, 1, 0]], np.int32)  # others in front, the same together
    apart = np.array([[0, 1, 2, 3, 4, 5]], np.int32)
    for got, fine, whole in ((wanted, 0, 0), (renumbered, 0, 3), (apart, 0, 4)):
        assert measure("map", got, wanted, "bf16") == [fine]
        assert measure("map", got, wanted, "fp32") == [whole]
    assert measure("map", np.zeros_like(wanted), wanted, "bf16") == [1]
    tokens = np.zeros((1, 5, 3), np.float32)
    far = tokens.copy()
    far[0, :2, 1] = 7
    assert measure("tokens", far, tokens, "fp32") == [7]
    assert measure("tokens", far, tokens, "fp16") == [0]
    far[0, 2] = 0.5
    assert measure("tokens", far, tokens, "fp16") == [0.5]


# What serves and ships


def test_a_pool_and_triton_are_told(make: Make, tmp_path: Path):
    bundle = make()
    images = sample_images(bundle.spec, 2)
    with EnginePool(bundle.path, threads=1) as pool:
        wanted = bundle.engine("r08", threads=1).run_all(images)
        for name, array in pool.run_all(images, "r08").items():
            np.testing.assert_allclose(array, wanted[name], atol=1e-5)
    text_format = pytest.importorskip("google.protobuf.text_format")
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    models = write_repository(bundle, tmp_path / "out", TritonOptions(), force=True)
    config = tmp_path / "out" / models[0].name / "config.pbtxt"
    outputs = text_format.Parse(config.read_text("utf-8"), pb.ModelConfig()).output
    found = [(o.name, o.data_type, list(o.dims)) for o in outputs]
    assert found == [
        ("tokens", pb.TYPE_FP32, [49, 64]), ("map", pb.TYPE_INT32, [49]),
        ("logits", pb.TYPE_FP32, [10]),
    ]  # fmt: skip


def test_a_plan_gives_them(nvidia: Any, make: Make, write_plan: Callable[..., Path]):
    bundle = make()
    engine = TensorRtEngine(write_plan(bundle, batch=(1, 2, 4)))
    found = engine.run_all(sample_images(bundle.spec, 3))
    forms = {name: (array.dtype, array.shape) for name, array in found.items()}
    assert forms == {
        "tokens": (np.float32, (3, 49, 64)), "map": (np.int32, (3, 49)),
        "logits": (np.float32, (3, 10)),
    }  # fmt: skip
    np.testing.assert_array_equal(found["map"], found["tokens"].reshape(3, -1)[:, :49].astype(int))


@pytest.mark.parametrize("outputs", [(*DENSE, "logits"), ("tokens",)])
def test_nvidia_s_parser_takes_them(make: Make, outputs: Any):
    trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    bundle = make({}, outputs)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    for name in bundle.variants:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        done = parser.parse_from_file(str(bundle.graph(name)))
        assert done, [parser.get_error(i).desc() for i in range(parser.num_errors)]
        kinds = {"tokens": trt.float32, "map": trt.int32, "logits": trt.float32}
        for index, output in enumerate(outputs):
            assert network.get_output(index).dtype == kinds[output]
            shape = tuple(network.get_output(index).shape)[1:]
            assert shape == bundle.forms[output].shape

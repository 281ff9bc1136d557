"""Embeddings beside logits: graphs, engines, refits and plans against the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file

import tocom_export
from tocom_export.bundle.file_hashes import record_files
from tocom_export.bundle.manifest import MANIFEST, seal
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.onnx.calibration import measure_input_scales
from tocom_export.engines.serving.pool import EnginePool
from tocom_export.engines.serving.triton import write_repository
from tocom_export.engines.serving.triton_options import TritonOptions
from tocom_export.engines.subject import make_subject
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.plan import check_plan, list_marked, open_plan
from tocom_export.engines.verify import TOLERANCES, Comparison, compare, sample_images, verify
from tocom_export.errors import BundleError, CheckFailed, InputError, PlanError
from tocom_export.graph.quantising import dequantize
from tocom_export.model.spec import VitSpec
from tocom_export.training.building import vit_from_spec
from tocom_export.training.torch_engine import Float32Oracle, load_model, make_oracle

NO_CLASS = {"class_token": False, "pool": "avg"}
KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "token, fc_norm": {"final_norm": "fc_norm"},
    "average": {"pool": "avg"},
    "average, fc_norm": {"pool": "avg", "final_norm": "fc_norm"},
    "average, no norm": {**NO_CLASS, "final_norm": None},
    "map": {"class_token": False, "pool": "map", "pool_heads": 4, "pool_mlp_width": 128},
    "token and average": {"pool": "token_avg"},
    "distilled": {"distilled": True},
    "no head": {"classes": 0},
    "no head, distilled": {"classes": 0, "distilled": True},
    "projection": {"classes": 0, "projection": 24, "head_bias": False, "pre_norm": True},
    "projection of both": {"classes": 0, "projection": 24, "pool": "token_avg"},
}
BOTH: Any = ("logits", "embedding")
RUNTIMES: dict[str, dict[str, Any]] = {
    "onnx": {"threads": 1},
    "openvino": {"backend": "openvino", "inference_precision": "f32", "threads": 1},
}
Make = Callable[..., Bundle]


@pytest.fixture
def make(make_blueprint: Callable[..., Blueprint], make_spec: Any, tmp_path: Path) -> Make:
    """A bundle of a small model, with both outputs where it has a head."""

    def call(
        changes: dict[str, Any] | None = None,
        name: str = "bundle",
        outputs: Any = None,
        unit: bool = False,
        **more: Any,
    ) -> Bundle:
        spec = make_spec(**(changes or {}))
        given = outputs or (BOTH if spec.classes else ("embedding",))
        made = make_blueprint(tmp_path, spec, **{"bank": None, "targets": (0, 4, 8), **more})
        made = dataclasses.replace(made, outputs=given, unit_embedding=unit)
        return write_bundle(made, tmp_path / name)

    return call


def ask_timm(bundle: Bundle, images: Any) -> dict[str, Any]:
    """What timm's own code says, without merging."""
    vit: Any = vit_from_spec(bundle.spec)
    state = dequantize(bundle.tensors("r00"))
    vit.load_state_dict({n: torch.from_numpy(np.array(t, np.float32)) for n, t in state.items()})
    with torch.inference_mode():
        tokens = vit.forward_features(torch.from_numpy(images))
        if bundle.spec.pool == "token_avg":  # which timm has no name for
            embedding = torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=-1)
            logits = vit.head(embedding).numpy()
            return {"embedding": logits if bundle.spec.projection else embedding.numpy(),
                    "logits": logits}  # fmt: skip
        embedding = vit.forward_head(tokens, pre_logits=not bundle.spec.projection)
        return {"embedding": embedding.numpy(), "logits": vit.forward_head(tokens).numpy()}


def differ(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_what_timm_s_head_reads(make: Make, kind: str, runtime: str):
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    bundle = make(KINDS[kind])
    images = sample_images(bundle.spec, 3)
    engine = bundle.engine("r00", **RUNTIMES[runtime])
    found, wanted = engine.run_all(images), ask_timm(bundle, images)
    assert tuple(found) == bundle.outputs
    for name, array in found.items():
        assert (array.dtype, array.shape) == (np.float32, (3, *bundle.forms[name].shape))
        assert differ(array, wanted[name]) < 1e-5, name
    np.testing.assert_array_equal(engine.run(images), found[bundle.outputs[0]])
    for name in ("r04", "r08"):
        oracle = make_oracle(bundle)
        merged = bundle.engine(name, **RUNTIMES[runtime]).run_all(images)
        for output, array in oracle.run_all(bundle.variant(name), images).items():
            assert differ(merged[output], array) < 1e-4, (name, output)
    assert differ(merged["embedding"], wanted["embedding"]) > 1e-3


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize(
    ("kind", "unit"),
    [("token", True), ("average, fc_norm", False), ("map", True), ("distilled", False)],
)
def test_other_precisions(make: Make, kind: str, precision: Any, unit: bool):
    bundle = make(KINDS[kind], unit=unit, precision=precision, targets=(0, 8))
    images = sample_images(bundle.spec, 20)
    wanted = ask_timm(bundle, images[:4])
    if unit:
        wanted["embedding"] /= np.linalg.norm(wanted["embedding"], axis=1, keepdims=True)
    for runtime, options in RUNTIMES.items():
        if runtime == "openvino":
            pytest.importorskip("openvino")
        found = bundle.engine("r00", **options).run_all(images[:4])
        for name, array in found.items():
            assert array.dtype == np.float32
            assert differ(array, wanted[name]) < TOLERANCES[precision], (runtime, name)
        if unit:
            np.testing.assert_allclose(np.linalg.norm(found["embedding"], axis=1), 1, atol=1e-5)
        checks = list(verify(bundle, images, make_oracle(bundle).run_all, backend=runtime))
        assert [check.passed for check in checks] == [True, True]


@pytest.mark.parametrize("kind", ["average", "token and average", "distilled", "no head"])
def test_an_embedding_of_length_one(make: Make, kind: str):
    plain = make(KINDS[kind], outputs=("embedding",))
    unit = make(KINDS[kind], "unit", ("embedding",), True)
    images = sample_images(plain.spec, 4)
    for name in plain.variants:
        long = plain.engine(name, threads=1).run(images)
        short = unit.engine(name, threads=1).run(images)
        np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
        wanted = long / np.linalg.norm(long, axis=1, keepdims=True)
        np.testing.assert_allclose(short, wanted, atol=1e-6)
    (found,) = verify(unit, images, make_oracle(unit).run_all, variants=["r08"], threads=1)
    assert (found.output, found.passed, found.agreement) == ("embedding", True, None)
    (found,) = verify(unit, images, make_oracle(plain).run_all, variants=["r08"], threads=1)
    assert not found.passed


def test_zeros_stay_zeros(make: Make):
    """A vector without a length has no direction."""
    unit = make({"pool": "avg", "final_norm": "fc_norm"}, unit=True, targets=(0,))
    weights = dict(unit.tensors("r00"))
    for name in ("fc_norm.weight", "fc_norm.bias"):
        weights[name] = np.zeros_like(weights[name])
    images = sample_images(unit.spec, 2)
    found = unit.engine("r00", weights=weights, threads=1).run_all(images)
    assert not found["embedding"].any()
    assert np.isfinite(found["logits"]).all()


def test_one_forward_gives_both(make: Make):
    counts = {}
    for outputs in (("logits",), ("embedding",), BOTH, BOTH[::-1]):
        graph = onnx.load(make({}, str(outputs), outputs).graph(8), load_external_data=False).graph
        assert tuple(value.name for value in graph.output) == outputs
        counts[outputs] = len(graph.node)
        held = {tensor.name for tensor in graph.initializer}
        assert ("head.weight" in held) is ("logits" in outputs)
    assert counts[BOTH] == counts[BOTH[::-1]] == counts["logits",] == counts["embedding",] + 1


def test_outputs_are_found_by_their_names(make: Make):
    images = None
    found = {}
    for order in (BOTH, BOTH[::-1]):
        bundle = make({}, str(order), order)
        images = sample_images(bundle.spec, 2)
        for runtime, options in RUNTIMES.items():
            if runtime == "openvino":
                pytest.importorskip("openvino")
            given = bundle.engine("r08", **options).run_all(images)
            assert tuple(given) == order
            found[order, runtime] = given
    for name in BOTH:
        for given in found.values():
            np.testing.assert_allclose(given[name], found[BOTH, "onnx"][name], atol=1e-4)


def test_a_graph_without_an_output_is_damaged(make: Make):
    bundle = make({}, outputs=("embedding",))
    asked = dataclasses.replace(bundle, outputs=BOTH)
    with pytest.raises(BundleError, match=r"r08\.onnx: ONNX Runtime can't run it"):
        asked.engine("r08", threads=1).run(sample_images(bundle.spec, 1))


def test_ranges_are_measured_beside_several_outputs(
    make_blueprint: Callable[..., Blueprint], tmp_path: Path
):
    made = make_blueprint(tmp_path, targets=(0, 8), precision="int8")
    made = dataclasses.replace(made, outputs=BOTH, unit_embedding=True)
    images = sample_images(made.weights.spec, 32)
    bundle = write_bundle(
        made, tmp_path / "b", calibrate=lambda b, v: measure_input_scales(b, v.name, images)
    )
    for check in verify(bundle, images[:20], make_oracle(bundle, made.weights.bank).run_all):
        assert check.passed, check


# What is told of several outputs


def give(logits: float, embedding: float) -> Callable[[Any], Any]:
    """Logits up to 100, of the last class, and an embedding up to 1, each off by so much."""

    def run(images: Any) -> Any:
        ones = np.ones((len(images), 3), np.float32)
        classes = np.array([20, 50, 100], np.float32)
        return {"logits": classes * ones + logits, "embedding": ones + embedding}

    return run


@pytest.mark.parametrize(
    ("off", "output", "passed"),
    [
        ((0, 0), "logits", True), ((5e-3, 5e-6), "logits", True), ((1e-3, 5e-5), "embedding", True),
        ((0.1, 0), "logits", False), ((5e-3, 1e-3), "embedding", False),
        ((np.nan, 0), "logits", False), ((0.1, np.inf), "embedding", False),
    ],
)  # fmt: skip
def test_each_is_held_against_its_own_largest_value(off: Any, output: str, passed: bool):
    images = np.zeros((20, 1), np.float32)
    values: Any = ("r08.onnx", "r08", "fp32")
    found = compare(give(*off), images, give(0, 0), *values, outputs=BOTH)
    assert (found.output, found.passed) == (output, passed)
    assert found.to_json()["output"] == output
    assert found.agreement == (0 if np.isnan(off[0]) else 100)
    if not passed:
        said = "gives .* that are NaN or Inf" if not found.finite else "differs from the model"
        with pytest.raises(CheckFailed, match=said) as caught:
            found.require("the model", "again.")
        assert ("embeddings" in str(caught.value)) is (output == "embedding")
    alone = compare(give(*off), images, None, *values, outputs=BOTH)
    assert (alone.passed, alone.agreement) == (bool(np.isfinite(off).all()), None)


@pytest.mark.parametrize("worst", BOTH)
def test_the_worst_where_nothing_may_differ(worst: str):
    off = (1.0, 1e-6) if worst == "logits" else (1e-4, 1.0)
    images = np.zeros((20, 1), np.float32)
    for order in (BOTH, BOTH[::-1]):
        run = partial(compare, give(*off), images, give(0, 0), "r08.onnx", "r08", "fp32")
        found = run(outputs=order, atol=0.0)
        assert (found.output, found.max_difference) == (worst, 1)
        assert (found.beyond, found.share, found.passed) == (20, np.inf, False)
    same = compare(give(*off), images, give(*off), "r08.onnx", "r08", "fp32", atol=0.0)
    assert (same.share, same.passed) == (0, True)


def test_what_an_oracle_may_give(make: Make):
    bundle = make({}, outputs=("embedding",), targets=(8,))
    images = sample_images(bundle.spec, 3)
    oracle = make_oracle(bundle)
    forms: dict[str, Callable[[Any], Any]] = {
        "tensor": torch.from_numpy, "lists": np.ndarray.tolist, "array": np.asarray,
        "named": lambda found: {"embedding": torch.from_numpy(found), "more": None},
    }  # fmt: skip
    for form in forms.values():
        (found,) = verify(bundle, images, lambda v, i, f=form: f(oracle(v, i)), threads=1)
        assert found.passed
        (found,) = verify(bundle, images, lambda v, i, f=form: f(oracle(v, i) + 1), threads=1)
        assert not found.passed
    says = "`oracle` gives no embedding; give embedding, each by its name"
    with pytest.raises(InputError, match=says):
        list(verify(bundle, images, lambda v, i: {"logits": oracle(v, i)}, threads=1))


def test_one_array_can_t_stand_for_several_outputs(make: Make):
    bundle = make()
    images = sample_images(bundle.spec, 2)
    with pytest.raises(InputError, match="`oracle` gives one array; logits, embedding are wanted"):
        list(verify(bundle, images, make_oracle(bundle), threads=1))
    alone = make({}, "alone", ("embedding",))
    assert all(check.passed for check in verify(alone, images, make_oracle(alone), threads=1))
    values = ("r08.onnx", "r08", 20, 1.0, 0.1, 5, None, True, False)
    assert Comparison(*values, output="embedding").share == pytest.approx(10)


def test_a_wrong_embedding_alone_is_seen(make: Make, tmp_path: Path):
    """A graph whose logits are right, and whose embedding is of another layer's norm."""
    bundle = make({}, targets=(8,))
    graph = onnx.load(bundle.graph(8), load_external_data=False)
    (last,) = (node for node in graph.graph.node if "embedding" in node.output)
    wrong = onnx.NodeProto()
    wrong.CopyFrom(last)
    last.output[0], wrong.name = "right", "wrong"
    wrong.input[1] = "blocks.3.norm2.weight"
    for node in graph.graph.node:
        node.input[:] = ["right" if name == "embedding" else name for name in node.input]
    graph.graph.node.append(wrong)
    bundle.graph(8).write_bytes(graph.SerializeToString())
    (found,) = verify(bundle, sample_images(bundle.spec), make_oracle(bundle).run_all, threads=1)
    assert (found.output, found.passed, found.agreement) == ("embedding", False, 100)
    with pytest.raises(CheckFailed, match=r"r08\.onnx differs from x .*max \|Δ\| of embeddings"):
        found.require("x", "y")


# Bundles that were written before


@pytest.fixture
def earlier(make: Make) -> Bundle:
    """A headless model's bundle of which the graphs call the features logits."""
    bundle = make({"classes": 0}, "earlier")
    for name in bundle.variants:
        file = bundle.graph(name)
        graph = onnx.load(file, load_external_data=False)
        for node in graph.graph.node:
            node.output[:] = ["logits" if o == "embedding" else o for o in node.output]
        graph.graph.output[0].name = "logits"
        file.write_bytes(graph.SerializeToString())
    data = json.loads((bundle.path / MANIFEST).read_text())
    assert data.pop("outputs") == ["embedding"]
    for name, record in record_files(bundle.path, [f"{n}.onnx" for n in bundle.variants]).items():
        data["files"][name] = dataclasses.asdict(record)
    (bundle.path / MANIFEST).write_text(seal(data))
    return Bundle.open(bundle.path, hashes=True)


def test_a_bundle_of_a_headless_model_that_was_written_before(
    earlier: Bundle, make: Make, make_checkpoint: Callable[..., Path], tmp_path: Path
):
    now = make({"classes": 0}, "now")
    images = sample_images(now.spec, 3)
    assert (earlier.outputs, earlier.has_logits) == (("logits",), False)
    assert earlier.find_output("embedding") == earlier.find_output("logits") == "logits"
    oracle = make_oracle(earlier)
    for runtime, options in RUNTIMES.items():
        if runtime == "openvino":
            pytest.importorskip("openvino")
        for name in now.variants:
            found = earlier.engine(name, **options).run_all(images)
            assert found.keys() == {"logits"}
            wanted = now.engine(name, **options).run(images)
            np.testing.assert_allclose(found["logits"], wanted, atol=1e-5)
        assert all(c.passed for c in verify(earlier, images, oracle.run_all, backend=runtime))
    subject = make_subject(earlier, ["r08"], Float32Oracle(earlier, "logits"), output="embedding")
    run = subject.runner(subject.variants[0])
    np.testing.assert_allclose(run(images), now.engine("r08").run(images), atol=1e-5)
    other = make_checkpoint(tmp_path, now.spec, 5)
    done = tocom_export.refit(earlier.path, checkpoint=other)
    assert all(check.passed for check in done.comparisons.values())
    assert done.bundle.outputs == ("logits",)


# Refits


@pytest.fixture
def other(make_weights: Callable[..., Any], tmp_path: Path) -> Callable[[VitSpec], Path]:
    """Another whole checkpoint of the model, its head included."""

    def call(spec: VitSpec) -> Path:
        save_file(make_weights(spec, 9), tmp_path / "other.safetensors")
        return tmp_path / "other.safetensors"

    return call


@pytest.mark.parametrize("outputs", [("embedding",), BOTH], ids=str)
@pytest.mark.parametrize("kind", ["token", "distilled"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_whole_checkpoint_refits_a_bundle_of_embeddings(
    make: Make, other: Any, make_bank: Any, kind: str, outputs: Any, precision: Any
):
    bank = make_bank(make(KINDS[kind], "spec", targets=(0,)).spec)
    bundle = make(
        KINDS[kind], outputs=outputs, unit=True, bank=bank, targets=(0, 8), precision=precision
    )
    file = other(bundle.spec)
    assert set(bundle.spec.weights()) <= bundle.tensors("r00").keys()  # the head's, too
    images = sample_images(bundle.spec, 20)
    before = bundle.engine("r08", threads=1).run_all(images)
    with EnginePool(bundle.path, backend="onnx", threads=1) as pool:
        pool.refit(checkpoint=file, bank=bank)
        pooled = pool.run_all(images, "r08")
        np.testing.assert_array_equal(pool.run(images, 8), pooled[outputs[0]])
    done = tocom_export.refit(bundle.path, checkpoint=file, bank=bank)
    assert [check.passed for check in done.comparisons.values()] == [True, True]
    after = done.bundle.engine("r08", threads=1).run_all(images)
    assert tuple(after) == done.bundle.outputs == outputs
    assert done.bundle.unit_embedding
    model = load_model(bundle.spec, done.weights.checkpoint.tensors, bundle.method)
    assert model.spec == bundle.spec
    for name in outputs:
        np.testing.assert_array_equal(pooled[name], after[name])
        assert differ(after[name], before[name]) > 0.1
    props = onnx.load(done.bundle.graph(8), load_external_data=False).metadata_props
    assert {p.key: p.value for p in props}["unit_embedding"] == "true"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_engine_of_embeddings_is_given_weights(make: Make, make_weights: Any, runtime: str):
    """All of the variant's, of which its graph has no use for the head's."""
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    bundle = make({}, outputs=("embedding",))
    images, new = sample_images(bundle.spec, 2), make_weights(bundle.spec, 4)
    engine = bundle.engine("r08", **RUNTIMES[runtime])
    before = engine.run(images)
    engine.refit(new)
    wanted = load_model(bundle.spec, new, bundle.method)
    with torch.inference_mode():
        expected = wanted.embedding(torch.from_numpy(images), 8).numpy()
    assert differ(engine.run(images), expected) < 1e-4
    engine.refit(bundle.tensors("r08"))
    np.testing.assert_allclose(engine.run(images), before, atol=1e-6)
    plain = bundle.engine("r08", compensated=False, **RUNTIMES[runtime])
    np.testing.assert_allclose(plain.run(images), before, atol=1e-6)


# What serves and ships


def test_a_pool_gives_all(make: Make):
    bundle = make()
    images = sample_images(bundle.spec, 2)
    with EnginePool(bundle.path, threads=1) as pool:
        wanted = bundle.engine("r00", threads=1).run_all(images)
        found = pool.run_all(images)
        assert tuple(found) == BOTH
        for name in BOTH:
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)
        np.testing.assert_array_equal(pool.run(images), found["logits"])
        np.testing.assert_array_equal(pool.serving.run(images), found["logits"])
        make({}, "bundle2", ("embedding",)).path.rename(bundle.path.with_name("kept"))
        bundle.path.rename(bundle.path.with_name("gone"))
        bundle.path.with_name("kept").rename(bundle.path)
        with pytest.raises(BundleError, match="gives other outputs now"):
            pool.reload()
        np.testing.assert_array_equal(pool.run(images), found["logits"])


def test_a_pool_of_other_lengths(make: Make):
    """Dividing by its length makes another output of an embedding."""
    bundle, unit = make(), make({}, "unit", unit=True)
    with EnginePool(bundle.path, threads=1) as pool:
        bundle.path.rename(bundle.path.with_name("gone"))
        unit.path.rename(bundle.path)
        says = r"gives other outputs now \(logits \(10\), embedding \(64, of length 1\)\); open"
        with pytest.raises(BundleError, match=says):
            pool.reload()
        assert not pool.bundle.unit_embedding


def test_triton_is_told_of_each_output(make_blueprint: Callable[..., Blueprint], tmp_path: Path):
    text_format = pytest.importorskip("google.protobuf.text_format")
    pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    names = tuple("abcdefghij")
    made = make_blueprint(tmp_path, targets=(8,), classes=names)
    for outputs, labelled in ((BOTH[::-1], True), (("embedding",), False)):
        bundle = write_bundle(dataclasses.replace(made, outputs=outputs), tmp_path / str(outputs))
        (model,) = write_repository(bundle, tmp_path / "out", TritonOptions(), force=True)
        place = tmp_path / "out" / model.name
        config = text_format.Parse((place / "config.pbtxt").read_text("utf-8"), pb.ModelConfig())
        found = [(o.name, o.data_type, list(o.dims), o.label_filename) for o in config.output]
        forms = {"logits": ([10], "labels.txt"), "embedding": ([64], "")}
        assert found == [(name, pb.TYPE_FP32, *forms[name]) for name in outputs]
        assert (place / "labels.txt").exists() is labelled


def test_a_plan_gives_all(nvidia: Any, make: Make, write_plan: Callable[..., Path]):
    bundle = make()
    plan = write_plan(bundle, batch=(1, 2, 4))
    _, record = open_plan(plan)
    assert (record.outputs, record.unit_embedding) == (BOTH, False)
    check_plan(bundle, "r08", record)
    engine = TensorRtEngine(plan)
    images = sample_images(bundle.spec, 4)
    for count in (1, 3, 3, 3, 4):  # by graph, too
        found = engine.run_all(images[:count])
        shapes = {name: array.shape for name, array in found.items()}
        assert shapes == {"logits": (count, 10), "embedding": (count, 64)}
        np.testing.assert_array_equal(found["embedding"][:, :10], found["logits"])
        np.testing.assert_array_equal(engine.run(images[:count]), found["logits"])
    having = dataclasses.replace(bundle, plans=("r08",))
    for changes in ({"outputs": ("logits",)}, {"unit_embedding": True}):
        with pytest.raises(PlanError, match="is of another kind of output than the bundle's r08"):
            check_plan(dataclasses.replace(having, **changes), "r08", record)
    with pytest.raises(PlanError, match="the two are not of one build"):
        TensorRtEngine(
            plan, unsaved=(plan.read_bytes(), dataclasses.replace(record, outputs=("logits",)))
        )


def test_a_plan_of_embeddings_marks_no_head(nvidia: Any, make: Make, write_plan: Any):
    bundle = make({}, outputs=("embedding",))
    marked = list_marked(bundle, bundle.tensors(8), "all")
    assert set(bundle.spec.weights()) - set(marked) == {"head.weight", "head.bias"}
    plan = write_plan(bundle, refit="all")
    assert not {"head.weight", "head.bias"} & open_plan(plan)[1].refittable.keys()
    images = sample_images(bundle.spec, 2)
    engine = dataclasses.replace(bundle, plans=("r08",)).engine("r08", backend="tensorrt")
    before = engine.run(images)
    assert before.shape == (2, 64)
    engine.refit(bundle.tensors(8))  # more than it takes
    np.testing.assert_array_equal(engine.run(images), before)

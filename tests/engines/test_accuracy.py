"""Engines judged by their accuracy on labelled images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.accuracy import (
    AccuracyCheck,
    check_accuracy,
    run_in_parts,
    verify_accuracy,
)
from tocom_export.engines.subject import make_subject
from tocom_export.engines.verify import Comparison, find_precision, sample_images, verify
from tocom_export.errors import DataError, DegreeError, DeviceError
from tocom_export.graph.precision import Precision
from tocom_export.study.accuracy import Difference, Score
from tocom_export.study.evaluate import measure
from tocom_export.training.torch_engine import Float32Oracle, StoredOracle, make_oracle
from tocom_export.variant import Variant

COUNT = 24


class Labelled:
    """Sample images under the classes that a variant says, in batches of 10."""

    name, classes = "images", tuple("abcdefghij")

    def __init__(self, bundle: Bundle, variant: str = "r00") -> None:
        self.images = sample_images(bundle.spec, COUNT)
        self.labels = bundle.engine(variant).run(self.images).argmax(axis=1)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for first in range(0, COUNT, 10):
            yield self.images[first : first + 10], self.labels[first : first + 10]


def score(hits: str, unusable: int = 0) -> Score:
    """An image a letter: R is right, w is wrong; the last ones are no numbers."""
    right = np.array([hit == "R" for hit in hits])
    predicted = np.where(right, 1, 2)
    predicted[len(hits) - unusable :] = -1
    return Score([predicted], [right])


def check(engine: str, pytorch: str, precision: Precision = "bf16", **more: Any) -> AccuracyCheck:
    unusable = more.pop("unusable", 0)
    return AccuracyCheck(
        "r08", precision, "onnx", score(engine, unusable), score(pytorch), "fp32", **more
    )


@pytest.mark.parametrize(
    "engine, pytorch, passed",
    [
        ("R" * 1000, "R" * 1000, True),
        ("R" * 999 + "w", "R" * 1000, True),  # a tenth of a point
        ("R" * 990 + "w" * 10, "R" * 1000, False),  # -1.0 points: -1.7 to -0.33
        ("R" * 991 + "w" * 9, "R" * 1000, True),  # -0.9 points: -1.51 to -0.28
        ("w" * 2 + "R" * 988 + "w" * 10, "R" * 1000, False),
        ("R" * 8 + "w" * 20 + "R" * 972, "w" * 8 + "R" * 992, True),  # -1.2 points: -2.2 to -0.16
        ("R" * 10 + "w" * 10, "R" * 20, False),  # half of 20
        ("R" * 18 + "w" * 2, "R" * 20, True),  # 10 points, of too few images to say
        ("w", "R", True),
        ("R" * 1000, "w" * 1000, True),  # better is no fault
    ],
    ids=range(10),
)
def test_what_is_lost_for_certain(engine: str, pytorch: str, passed: bool):
    found = check(engine, pytorch)
    assert found.passed is passed
    assert (found.difference.interval[1] >= -0.3) is passed
    if not passed:
        least = f"{-found.difference.interval[1]:.2f}"
        assert found.failure == (f"accuracy is {least} points or more below PyTorch's, 0.3 allowed")


def test_too_few_images_are_told():
    assert check("R" * 500, "R" * 500).doubtful  # ± 0.39
    assert not check("R" * 1000, "R" * 1000).doubtful  # ± 0.196
    assert check("R" * 991 + "w" * 9, "R" * 1000).doubtful
    assert not check("R" * 900 + "w" * 100, "R" * 1000).doubtful  # it failed
    assert not check("R" * 500, "R" * 500, "fp32").doubtful


@pytest.mark.parametrize("engine, passed", [("R" * 999 + "w", True), ("R" * 998 + "ww", False)])
def test_fp32_is_to_be_within_a_tenth_of_a_point_where_no_logits_are_judged(
    engine: str, passed: bool
):
    for ours, theirs in ((engine, "R" * 1000), ("R" * 1000, engine)):
        found = check(ours, theirs, "fp32", alone=True)
        assert found.passed is passed
        points = found.difference.points
        assert passed or found.failure == (
            f"accuracy is {points:+.2f} points off PyTorch's, ±0.1 allowed"
        )
        assert check(ours, theirs, "fp32").passed
        assert check(ours, theirs, "fp16", alone=True).passed


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_logit_that_is_no_number_fails(precision: Precision):
    found = check("R" * 20, "R" * 20, precision, unusable=1)
    assert found.failure == "NaN or Inf on 1 of 20 images"
    assert not found.passed
    assert found.to_json()["finite"] is found.to_json()["passed"] is False


def test_a_row():
    found = check("RRww", "RwRw")
    row = found.to_json()
    assert list(row) == [
        "variant", "precision", "backend", "accuracy", "accuracy_low", "accuracy_high", "images",
        "pytorch", "pytorch_weights", "difference", "difference_low", "difference_high",
        "agreement", "finite", "passed",
    ]  # fmt: skip
    assert (row["accuracy"], row["pytorch"], row["difference"], row["images"]) == (50, 50, 0, 4)
    assert (row["accuracy_low"], row["accuracy_high"]) == found.engine.interval
    assert (row["difference_low"], row["difference_high"]) == Difference(1, 1, 4).interval
    assert row["agreement"] == 50
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("atol", [None, 0.1])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_logits_decide_in_fp32_or_where_a_tolerance_was_given(precision: Precision, atol: Any):
    values = ("r08.onnx", "r08", 20, 1.0, 0.1, 20, 50.0)
    far = Comparison(*values, True, strict=atol is not None, precision=precision)
    assert not far.passed
    assert far.leave_to_accuracy().passed is (precision != "fp32" and atol is None)
    broken = dataclasses.replace(far, finite=False).leave_to_accuracy()
    assert not broken.passed


def test_each_engine_beside_the_model(bundle: Bundle):
    data = Labelled(bundle)
    steps: list[Any] = []

    class Progress:
        def __init__(self, title: str, total: int) -> None:
            steps.append((title, total))

        def __enter__(self) -> Callable[[str], None]:
            return steps.append

        def __exit__(self, *_: object) -> None: ...

    engines = [("r00", "onnx"), ("16", "onnx")]
    found = verify_accuracy(bundle, data, Float32Oracle(bundle), engines, progress=Progress)
    assert [(c.variant, c.backend, c.stored_as) for c in found] == [
        ("r00", "onnx", "fp32"), ("r16", "onnx", "fp32"),
    ]  # fmt: skip
    assert found[0].engine.accuracy == found[0].pytorch.accuracy == 100
    assert found[1].engine.accuracy == found[1].pytorch.accuracy < 100
    assert [(c.agreement, c.passed, c.engine.total) for c in found] == [(100, True, COUNT)] * 2
    assert steps == [("measuring accuracy", 3), "", "", ""]


def test_an_engine_with_other_weights(
    bundle: Bundle, blueprint: Blueprint, revise: Callable, tmp_path: Path
):
    rounded = dataclasses.replace(blueprint.weights, precision="bf16")
    half = write_bundle(revise(blueprint, weights=rounded), tmp_path / "half")
    data = Labelled(bundle)
    (good,) = verify_accuracy(half, data, Float32Oracle(half), [("r00", "onnx")])
    assert (good.precision, good.stored_as, good.passed) == ("bf16", "bf16", True)
    file = half.path / "weights.safetensors"
    content = file.read_bytes()
    oracle = Float32Oracle(half)
    run = oracle.runner(half.variant("r00"))  # before the file changes

    class Before:
        stored_as = staticmethod(oracle.stored_as)

        def runner(self, variant: Variant) -> Any:
            return run

    kept = run(data.images)
    file.write_bytes(content[: len(content) // 2] + b"\x3f" * (len(content) - len(content) // 2))
    np.testing.assert_array_equal(run(data.images), kept)
    (bad,) = verify_accuracy(half, data, Before(), [("r00", "onnx")])
    assert bad.pytorch.right == good.pytorch.right
    assert not bad.passed
    assert "or more below PyTorch's" in bad.failure


def test_images_of_other_classes(bundle: Bundle):
    data = Labelled(bundle)
    data.classes = ("a", "b")
    with pytest.raises(DataError, match=r"`data` images has 2 classes, but .* a head of 10"):
        verify_accuracy(bundle, data, Float32Oracle(bundle), [("r00", "onnx")])


def test_a_study_is_judged_alike(bundle: Bundle):
    data = Labelled(bundle)
    oracle = Float32Oracle(bundle)
    measured = measure([make_subject(bundle, ["r08"], oracle)], data, check=True)
    found = check_accuracy(measured[0])
    (other,) = verify_accuracy(bundle, data, oracle, [("r08", "onnx")])
    assert found.to_json() == other.to_json()
    assert found.alone and not other.alone


def test_a_subject_runs_the_weights_that_it_is_asked_for(bundle: Bundle, make_images: Callable):
    images = make_images(bundle.spec)
    subject = make_subject(bundle, ["r08", 0])
    assert (subject.backend, subject.oracle) == ("onnx", None)
    assert [variant.name for variant in subject.variants] == ["r08", "r00"]
    eight = subject.variants[0]
    whole = subject.runner(eight)(images)
    np.testing.assert_array_equal(whole, bundle.engine("r08").run(images))
    alone = subject.runner(dataclasses.replace(eight, compensated=False))(images)
    shared = StoredOracle(bundle)
    assert np.abs(alone - whole).max() > 1e-3
    np.testing.assert_allclose(whole, shared(eight, images), atol=1e-4)


@pytest.mark.parametrize(
    "stored, computed, expected",
    [
        ("fp32", "fp32", "fp32"),
        ("fp32", "fp16", "fp16"),
        ("fp32", "bf16", "bf16"),
        ("fp16", "fp32", "fp16"),
        ("fp16", "bf16", "bf16"),
        ("int8", "int8", "int8"),
    ],
)
def test_what_an_engine_computes_in(stored: Precision, computed: Precision, expected: Precision):
    engine: Any = SimpleNamespace(precision=computed)
    assert find_precision(engine, stored) == expected


@pytest.mark.parametrize("computed", ["f32", "bf16"])
def test_openvino_is_judged_by_what_it_computes_in(bundle: Bundle, computed: str):
    pytest.importorskip("openvino")
    data, oracle = Labelled(bundle), Float32Oracle(bundle)
    options = {"inference_precision": computed}
    try:
        checks = verify_accuracy(bundle, data, oracle, [("r08", "openvino")], **options)
    except DeviceError:
        pytest.skip("this CPU has no bfloat16")
    expected = {"f32": "fp32", "bf16": "bf16"}[computed]
    assert [(c.backend, c.precision, c.passed) for c in checks] == [("openvino", expected, True)]
    oracle, images = make_oracle(bundle), data.images
    (found,) = verify(bundle, images, oracle, backend="openvino", variants=["r08"], **options)
    assert (found.engine, found.backend, found.precision) == ("r08.onnx", "openvino", expected)
    assert found.passed
    (found,) = verify(bundle, images, oracle, backend="openvino", variants=["r08"])
    assert (found.precision, found.passed) == ("fp32", True)  # to find bugs
    subject = make_subject(bundle, ["r08"], backend="openvino")
    assert subject.precision in ("fp32", "bf16")
    eight = subject.variants[0]
    alone = subject.runner(dataclasses.replace(eight, compensated=False))(images)
    assert np.abs(alone - subject.runner(eight)(images)).max() > 1e-2


def test_plans_are_run_in_parts(nvidia: Any, fresh: Bundle, write_plan: Callable):
    images = sample_images(fresh.spec, 7)
    write_plan(fresh, "r08", batch=(1, 2, 3))
    having = dataclasses.replace(fresh, plans=("r08",))
    subject = make_subject(having, ["r08"], backend="tensorrt")
    nvidia.trt.asked.clear()
    whole = subject.runner(having.variant("r08"))(images)
    assert len(whole) == 7
    shapes = [shape[0] for kind, shape, *_ in nvidia.trt.asked if kind == "shape"]
    assert shapes == [3, 1]
    engine = having.engine("r08", backend="tensorrt")
    np.testing.assert_array_equal(run_in_parts(engine, "logits")(images), whole)
    plain = subject.runner(dataclasses.replace(having.variant("r08"), compensated=False))
    assert not np.array_equal(plain(images), whole)
    with pytest.raises(DegreeError, match="has no plan for r16"):
        make_subject(having, ["r16"], backend="tensorrt").runner(having.variant("r16"))

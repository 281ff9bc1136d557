"""Measuring which backend a bundle runs fastest on, within a budget of accuracy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines import opening
from tocom_export.engines.bench import picking
from tocom_export.engines.bench.picking import pick
from tocom_export.engines.bench.timing import summarise_times
from tocom_export.engines.picking import Choice, find_pick
from tocom_export.engines.verify import sample_images
from tocom_export.errors import InputError

ONNX, F32 = Choice("onnx"), Choice("openvino", "f32")
QUICK: dict[str, Any] = {"seconds": 0.0, "threads": 1, "batch": [1]}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, and no process that measures memory."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tocom_export.engines.bench.memory.measure_memory", lambda *_: 1)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a backend seem slower than it is."""
    from tocom_export.engines.bench import run

    def call(backend: str) -> None:
        real = run._time
        ages = dict.fromkeys(("low_ms", "median_ms", "high_ms"), 1e6)

        def time(subjects: Any, *rest: Any) -> Any:
            found = real(subjects, *rest)
            return [
                dataclasses.replace(t, **ages) if s.about[1] == backend else t
                for s, t in zip(subjects, found, strict=True)
            ]

        monkeypatch.setattr(run, "_time", time)

    return call


@pytest.mark.parametrize(("loser", "wanted"), [("onnx", F32), ("openvino", ONNX)])
def test_the_fastest_is_kept(bundle: Bundle, slow: Any, loser: str, wanted: Choice):
    slow(loser)
    found = pick(bundle, [ONNX, F32], ["r00", "r16"], **QUICK)
    assert found.choice == wanted == find_pick(bundle)
    assert [row.backend for row in found.report.rows] == ["onnx"] * 2 + ["openvino"] * 2
    assert [candidate.loss for candidate in found.candidates] == [None, None]
    assert found.to_json()["choice"] == wanted.options
    assert not any("scatter" in line for line in found.explain())


def test_a_choice_that_chance_may_have_made_is_told(bundle: Bundle, monkeypatch):
    def time(subjects: Any, *rest: Any) -> Any:
        return [summarise_times([1 + n / 10, 2 + n / 10, 3], 1) for n, _ in enumerate(subjects)]

    monkeypatch.setattr("tocom_export.engines.bench.run._time", time)
    found = pick(bundle, [ONNX, F32], ["r16"], **QUICK)
    first, last = found.explain()
    assert found.choice == ONNX
    assert last.startswith(f"Picked {ONNX}: ")
    assert first == (
        f"Times scatter more than those of {ONNX} and openvino in fp32 differ: another time it may "
        "be another."
    )


def test_what_loses_too_much_is_not_timed(
    bundle: Bundle, slow: Any, monkeypatch: pytest.MonkeyPatch
):
    slow("onnx")
    images = sample_images(bundle.spec, 20)
    labels = bundle.engine("r16").run(images).argmax(axis=1)
    real = opening.open_engine

    def open_engine(*arguments: Any, backend: str, **options: Any) -> Any:
        engine = real(*arguments, backend=backend, **options)
        if backend == "openvino":  # each image's logits are another's
            others = {"logits": np.roll(np.eye(10)[labels], 1, axis=1)}
            monkeypatch.setattr(type(engine), "run_all", lambda self, x: others)
        return engine

    monkeypatch.setattr(picking, "open_engine", open_engine)
    data = [(images, labels)]
    found = pick(bundle, [ONNX, F32], ["r16"], data=data, max_loss=50, **QUICK)
    assert [candidate.loss for candidate in found.candidates] == [0, 100]
    assert found.choice == ONNX
    assert {row.backend for row in found.report.rows} == {"onnx"}
    assert found.to_json()["candidates"][1]["accuracy"] == {"r16": 0.0}
    found = pick(bundle, [ONNX, F32], ["r16"], data=data, max_loss=100, **QUICK)
    assert found.choice == F32


def test_a_budget_that_is_none(bundle: Bundle):
    with pytest.raises(InputError, match="`max_loss` -1: points of accuracy"):
        pick(bundle, [ONNX], max_loss=-1, **QUICK)

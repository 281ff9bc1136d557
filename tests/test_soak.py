"""The short form of ``scripts/soak.py``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.writing import Blueprint

PLACE = Path(__file__).parents[1] / "scripts" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> Any:
    spec = importlib.util.spec_from_file_location("soak", PLACE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def blueprint(tmp_path: Path, make_blueprint) -> Blueprint:
    falling = {"fast": (16, 11, 6, 0)}
    return make_blueprint(tmp_path, targets=(0, 4, 8, 12, 16), schedules=falling)


def test_twenty_seconds(soak, blueprint: Blueprint, tmp_path: Path):
    found = soak.Soak(blueprint, tmp_path).run(20, 8)
    assert found["failures"] == []
    assert found.get("wrong", 0) == found.get("lost", 0) == 0
    assert found["right"] + found["refused"] == found["requests"] > 200
    assert found["refused"] > 0
    assert found["refits"] > 4
    assert found["refits refused"] > 0
    assert found["switches"] > 30


def test_it_notices_wrong_answers(soak, blueprint: Blueprint, tmp_path: Path):
    running = soak.Soak(blueprint, tmp_path)
    for logits in running.wanted.values():
        logits[0] = np.nextafter(logits[0], np.float32(0))
    found = running.run(1, 2)
    assert found["wrong"] > 0
    assert not soak.passed(found)


def test_it_notices_lost_ones(soak, blueprint: Blueprint, tmp_path: Path):
    running = soak.Soak(blueprint, tmp_path)
    running.images[0] = running.images[0][:, :1]
    found = running.run(1, 2)
    assert found["lost"] > 0
    assert not soak.passed(found)


@pytest.mark.parametrize("growth, ok", [(0.005, True), (0.02, False), (None, True)])
def test_memory_that_grows(soak, growth: float | None, ok: bool):
    found = {"right": 9, "refused": 1, "requests": 10, "failures": [], "growth": growth}
    assert soak.passed(found) == ok


def test_it_notices_a_switch_and_a_refit_that_do_nothing(
    soak, blueprint: Blueprint, tmp_path: Path, monkeypatch
):
    running = soak.Soak(blueprint, tmp_path)
    monkeypatch.setattr(running.pool, "switch", lambda name: running.pool.serving)
    monkeypatch.setattr(running.pool, "refit", lambda **_: None)
    found = running.run(2, 1)
    assert any("switch" in failure for failure in running.failures)
    assert any("refit to" in failure for failure in running.failures)
    assert not soak.passed(found)

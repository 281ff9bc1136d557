from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.bench.timing import summarise_times
from tocom_export.engines.bench.trtexec import time_plans, write_lines
from tocom_export.engines.tensorrt import trtexec
from tocom_export.errors import DegreeError, InputError


@pytest.fixture
def planned(nvidia: Any, mixed: Bundle, write_plan: Callable[..., Path]) -> Bundle:
    """Plans, by the pretended library, of r08 and of a variant with a degree per layer."""
    for variant in ("r08", "fast"):
        write_plan(mixed, variant)
    return dataclasses.replace(mixed, plans=("r08", "fast"))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """In place of trtexec 11: each run takes a millisecond an image."""
    found: list[list[str]] = []
    layer = trtexec.LayerTime("attention", 0.5, 50)
    monkeypatch.setattr(trtexec, "find", lambda: (Path("/opt/trtexec"), 11))
    monkeypatch.setattr(trtexec, "run", found.append)
    monkeypatch.setattr(trtexec, "read_times", lambda _, n: summarise_times([n / 1000], n))
    monkeypatch.setattr(trtexec, "read_profile", lambda _: [layer])
    return found


def test_every_plan_at_every_batch(planned: Bundle, ran: list[list[str]]):
    told: list[str] = []
    logged: list[str] = []
    report = time_plans(
        planned, ["fast", 8], batch=(1, 8), layers=True, progress=told.append, log=logged.append
    )
    assert report is not None
    assert [(row.variant, row.backend, row.timing.median_ms) for row in report.rows] == [
        ("fast", "trtexec", 1), ("r08", "trtexec", 1), ("fast", "trtexec", 8), ("r08", "trtexec", 8)
    ]  # fmt: skip
    assert list(report.layers) == ["fast", "r08"]
    assert told == ["fast, batch 1", "fast, batch 8", "r08, batch 1", "r08, batch 8"]
    assert [line.split()[0] for line in logged] == ["trtexec"] * 4
    assert [line[0] for line in ran] == ["/opt/trtexec"] * 4
    assert f"--loadEngine={planned.plan('fast')}" in ran[0]
    assert not any("exportProfile" in option for option in ran[0])
    assert any("exportProfile" in option for option in ran[1])  # at the largest batch alone


def test_without_trtexec(planned: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trtexec, "find", lambda: None)
    assert time_plans(planned, ["fast"]) is None
    with pytest.raises(DegreeError, match="no plan for r00"):
        time_plans(planned)
    lines = write_lines(planned, ["fast"], batch=(2,))
    assert list(lines) == [("fast", 2)]
    assert {"--useSpinWait", "--exportTimes=times.json"} <= {*lines["fast", 2]}  # as 10 needs


def test_a_batch_that_a_plan_doesn_t_take(planned: Bundle, ran: list[list[str]]):
    with pytest.raises(InputError, match=r"`batch` 33: .*fast\.plan takes 1 to 32 images"):
        time_plans(planned, ["fast"], batch=(1, 33))
    assert not ran

from __future__ import annotations

import dataclasses

import pytest

from tocom_export.engines.bench.timing import summarise_times, time_engines


def test_a_summary():
    found = summarise_times([0.001 * ms for ms in range(101)], batch=4)
    assert dataclasses.asdict(found) == {
        "batch": 4, "runs": 101, "median_ms": pytest.approx(50), "min_ms": 0,
        "low_ms": pytest.approx(10), "high_ms": pytest.approx(90), "p99_ms": pytest.approx(99),
        "images_per_s": pytest.approx(80),
    }  # fmt: skip


def test_engines_take_turns():
    ran: list[str] = []
    told: list[str] = []
    runs = {name: lambda name=name: ran.append(name) for name in "ab"}
    found = time_engines(runs, 1, 0.0, told.append)
    assert told == ["a", "b"]
    assert ran[:6] == ["a"] * 3 + ["b"] * 3
    rounds = ["".join(ran[i : i + 2]) for i in range(6, 26, 2)]
    assert len(ran) == 26
    assert set(rounds) == {"ab", "ba"}  # neither always follows the other
    assert [timing.runs for timing in found.values()] == [10, 10]
    assert all(t.min_ms <= t.low_ms <= t.median_ms <= t.high_ms <= t.p99_ms for t in found.values())

from __future__ import annotations

import dataclasses
import time

import pytest

from tocom_export.engines.bench.timing import summarise_times, time_engines


def test_a_summary():
    found = summarise_times([0.001 * ms for ms in range(101)], batch=4)
    assert dataclasses.asdict(found) == {
        "batch": 4, "runs": 101, "median_ms": pytest.approx(50), "min_ms": 0,
        "low_ms": pytest.approx(10), "high_ms": pytest.approx(90), "p99_ms": pytest.approx(99),
        "images_per_s": pytest.approx(80),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "faster"),
    [
        ([10] * 10, [10.2] * 10, True),  # on a quiet machine a little is told
        ([10] * 10, [10] * 10, False),
        ([9, 10, 14, 15, 16], [9.5, 10.5, 15, 15.5, 17], False),  # on a busy one noise is not
        ([10] * 5, [9, 9.5, 12, 13, 14], False),  # the other's runs reach as low
        ([10, 10, 10, 14, 15], [13] * 5, False),  # its own as high
        ([9, 10, 11, 12, 13], [19, 20, 21, 22, 23], True),
    ],
)
def test_what_is_faster_beyond_doubt(one: list[float], other: list[float], faster: bool):
    first, second = (summarise_times([0.001 * ms for ms in times], 1) for times in (one, other))
    assert first.is_faster(second) == faster
    assert not second.is_faster(first)


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


def test_slow_engines_are_run_less_often():
    runs = [0, 0]

    def slow() -> None:
        runs[0] += 1
        time.sleep(0.02)

    def fast() -> None:
        runs[1] += 1

    found = time_engines({"slow": slow, "fast": fast}, 1, 0.0, at_most=0.01)
    assert (found["slow"].runs, runs[0]) == (10, 11)  # the fast one has its ten, in turns
    assert (found["fast"].runs, runs[1]) == (10, 13)
    assert time_engines({"slow": slow}, 1, 0.0, at_most=0.01)["slow"].runs == 1

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tocom_export.engines.serving import simulation
from tocom_export.engines.serving.simulation import (
    TRACES,
    compare_steering,
    draw_arrivals,
    draw_traces,
    read_arrivals,
    simulate,
    summarise_requests,
)
from tocom_export.engines.serving.steering import Load, State, Steering
from tocom_export.errors import InputError

RATES = {
    "steady": [0.7] * 10,
    "burst": [0.5, 0.5, 1.5, 1.5, 0.5, 0.5, 1.5, 1.5, 0.5, 0.5],
    "ramp": [0.275, 0.425, 0.575, 0.725, 0.875, 1.025, 1.175, 1.325, 1.475, 1.625],
    "overload": [2.5] * 10,
}
"""Arrivals over what the slowest variant can serve, in each tenth of a trace."""


@pytest.mark.parametrize("shape", RATES)
def test_the_rate_follows_the_shape(shape: str):
    arrivals = draw_arrivals(shape, 5000, 40)
    counts, _ = np.histogram(arrivals, 10, (0, 40))
    np.testing.assert_allclose(counts / (5000 * 4), RATES[shape], rtol=0.04)
    gaps = np.diff(draw_arrivals("steady", 5000, 40))
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # at random, not by the clock


def test_every_shape_is_known():
    assert list(TRACES) == list(RATES)


@pytest.mark.parametrize("shape", RATES)
def test_arrivals_ascend_and_lie_within_the_trace(shape: str):
    arrivals = draw_arrivals(shape, 20, 30)
    assert arrivals.dtype == np.float64
    assert (np.diff(arrivals) >= 0).all()
    assert 0 <= arrivals[0] <= arrivals[-1] < 30


@pytest.mark.parametrize("shape", RATES)
def test_the_same_seed_gives_the_same_arrivals(shape: str):
    np.testing.assert_array_equal(
        draw_arrivals(shape, 20, 30), draw_arrivals(shape, 20, 30, seed=0)
    )
    other = draw_arrivals(shape, 20, 30, seed=1)
    assert not np.isin(other, draw_arrivals(shape, 20, 30)).any()


def test_the_rate_is_that_of_the_capacity():
    assert len(draw_arrivals("steady", 200, 60)) == pytest.approx(8400, rel=0.04)
    assert len(draw_arrivals("steady", 20, 60)) == pytest.approx(840, rel=0.1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0\n0.5\n1.25\n", [0, 0.5, 1.25]),
        ("1700000000.5\r\n1700000000.5\r\n1700000002", [0, 0, 1.5]),  # Unix time, two at once
        ("-3\n-1e0\n\n", [0, 2]),
        ("7", [0]),
    ],
)
def test_arrivals_from_a_file(tmp_path: Path, text: str, expected: list[float]):
    file = tmp_path / "arrivals.txt"
    file.write_bytes(text.encode())
    found = read_arrivals(file)
    assert found.dtype == np.float64
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b"\n\n", "it is empty"),
        (b"0\n2\n1\n", "finite numbers of seconds in ascending order"),
        (b"0\nnan\n1\n", "finite numbers of seconds in ascending order"),
        (b"0\ninf\n", "finite numbers of seconds in ascending order"),
        (b"-inf\n0\n", "finite numbers of seconds in ascending order"),
        (b"0\nsoon\n", "a number of seconds is expected on each line"),
        (b"time\n0\n", "a number of seconds is expected on each line"),
        (b"0,1,2\n", "a number of seconds is expected on each line"),
        (b"0\n\xff\xfe\n", "a number of seconds is expected on each line"),
    ],
    ids=str,
)
def test_what_is_no_list_of_arrivals(tmp_path: Path, content: bytes, says: str):
    file = tmp_path / "arrivals.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read_arrivals(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_can_t_be_read(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.txt: can't be read: No such file"):
        read_arrivals(tmp_path / "none.txt")
    with pytest.raises(InputError, match="can't be read"):
        read_arrivals(tmp_path)


def test_a_huge_file(tmp_path: Path):
    file = tmp_path / "arrivals.txt"
    with file.open("wb") as stream:
        stream.truncate(100_000_001)
    with pytest.raises(InputError, match=r"arrivals\.txt is too large"):
        read_arrivals(file)


def test_a_trace_of_each_shape(monkeypatch: pytest.MonkeyPatch):
    """Long enough for the slowest variant to serve so many, and of so many seconds."""
    monkeypatch.setattr(simulation, "TRACE_SECONDS", 4)
    traces = draw_traces({"fast": 0.001, "r00": 0.01})
    assert list(traces) == list(TRACES)
    assert traces["steady"][-1] == pytest.approx(20, rel=0.02)  # 2000 at 100 a second
    assert len(traces["steady"]) == pytest.approx(1400, rel=0.1)
    short = draw_traces({"fast": 0.0001, "r00": 0.001})
    assert short["steady"][-1] == pytest.approx(4, rel=0.02)


def test_a_summary():
    names = ["r00", "fast", "fast", "r04"]
    accuracy = {"r00": 80.0, "fast": 70.0, "r04": 78.0, "r16": 60.0}
    found = summarise_requests([0.1, 0.2, 0.3, 0.4], names, 0.3, accuracy)
    assert dataclasses.asdict(found) == {
        "requests": 4, "met": 75, "shares": {"fast": 50, "r00": 25, "r04": 25},
        "accuracy": pytest.approx(74.5), "p50_ms": pytest.approx(250),
        "p99_ms": pytest.approx(397), "switches": 2,
    }  # fmt: skip
    assert list(found.shares) == ["fast", "r00", "r04"]  # the largest first
    assert dataclasses.asdict(summarise_requests([1.0], ["r16"], 0.5)) == {
        "requests": 1, "met": 0, "shares": {"r16": 100}, "accuracy": None, "p50_ms": 1000,
        "p99_ms": 1000, "switches": 0,
    }  # fmt: skip


def test_the_accuracy_of_what_answered_alone_is_needed():
    assert summarise_requests([1.0], ["r16"], 0.5, {"r16": 75.5}).accuracy == 75.5
    assert summarise_requests([1.0, 1.0], ["r16", "r00"], 0.5, {"r16": 75.5}).accuracy is None


@pytest.fixture
def server() -> SimpleNamespace:
    """In place of a steering: r04 for the first two requests, "fast" for the others."""
    loads: list[Load] = []
    times: list[tuple[str, float]] = []

    def step(state: State, load: Load) -> State:
        loads.append(load)
        return State("r04" if len(loads) < 3 else "fast")

    def observe(state: State, variant: str, seconds: float) -> State:
        times.append((variant, seconds))
        return state

    return SimpleNamespace(
        seconds={"r04": 0.5, "fast": 0.25}, slo=0.75, start=lambda: State("r04"), step=step,
        observe=observe, accuracy={"r04": 80, "fast": 75}, loads=loads, times=times,
    )  # fmt: skip


def test_requests_are_served_one_after_another(server: SimpleNamespace):
    found = simulate(np.array([0, 0.125, 0.5, 0.75, 4]), server)
    assert server.loads == [
        Load(0, 1, 0),
        Load(0.5, 2, 0.375),  # one that comes at this moment waits, too
        Load(1, 2, 0.5),
        Load(1.25, 1, 0.5),
        Load(4, 1, 0),
    ]
    assert server.times == [
        ("r04", 0.5),
        ("r04", 0.5),
        ("fast", 0.25),
        ("fast", 0.25),
        ("fast", 0.25),
    ]
    # latencies: 0.5, 0.875, 0.75, 0.75, 0.25
    assert (found.requests, found.met, found.p50_ms) == (5, 80, 750)
    assert (found.shares, found.switches) == ({"fast": 60, "r04": 40}, 1)
    assert found.accuracy == pytest.approx(77)


def test_a_slow_machine_is_measured_as_it_is(server: SimpleNamespace):
    """The slowdown is that of the moment when a request is begun."""
    slow: Callable[[float], float] = lambda now: 2.0 if now >= 1 else 1.0  # noqa: E731
    simulate(np.array([0, 0.75, 0.875, 1.5]), server, slow)
    assert server.times == [("r04", 0.5), ("r04", 0.5), ("fast", 0.5), ("fast", 0.5)]
    assert [load.now for load in server.loads] == [0, 0.75, 1.25, 1.75]


def test_a_fixed_variant():
    fixed = Steering({"r00": 0.5, "fast": 0.25}, 0.3, variants=["fast"])
    found = simulate(np.array([0.0, 0.25, 0.5, 0.5]), fixed)
    assert (found.shares, found.met, found.switches) == ({"fast": 100}, 75, 0)


@pytest.mark.parametrize("variants", [None, ["r00", "fast"]])
def test_steering_beside_each_variant_alone(variants: list[str] | None):
    seconds = {"r00": 0.5, "fast": 0.25} | ({"r16": 0.1} if variants else {})
    steering = Steering(seconds, 0.6, {"r00": 80, "fast": 75}, variants, hold=0)
    arrivals = np.array([0.0, 0.25, 0.5, 0.5, 9])
    found = compare_steering(steering, arrivals)
    assert found.steered == simulate(arrivals, steering)
    assert list(found.fixed) == ["r00", "fast"]
    for name, outcome in found.fixed.items():
        assert (outcome.shares, outcome.switches) == ({name: 100}, 0)
        assert outcome.accuracy == steering.accuracy[name]
    assert found.fixed["r00"].met < found.steered.met

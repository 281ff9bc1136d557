from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tocom_export.engines.serving.simulation import TRACES, outcome, recorded, simulate, synthetic
from tocom_export.engines.serving.steering import Load, State, Steering
from tocom_export.errors import InputError

RATES = {
    "steady": [0.7] * 10,
    "burst": [0.5, 0.5, 1.5, 1.5, 0.5, 0.5, 1.5, 1.5, 0.5, 0.5],
    "ramp": [0.275, 0.425, 0.575, 0.725, 0.875, 1.025, 1.175, 1.325, 1.475, 1.625],
    "overload": [2.5] * 10,
}
"""Arrivals over what the dense model can serve, in each tenth of a trace."""


@pytest.mark.parametrize("shape", RATES)
def test_the_rate_follows_the_shape(shape: str):
    arrivals = synthetic(shape, 5000, 40)
    counts, _ = np.histogram(arrivals, 10, (0, 40))
    np.testing.assert_allclose(counts / (5000 * 4), RATES[shape], rtol=0.04)
    gaps = np.diff(synthetic("steady", 5000, 40))
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # at random, not by the clock


def test_every_shape_is_known():
    assert list(TRACES) == list(RATES)


@pytest.mark.parametrize("shape", RATES)
def test_arrivals_ascend_and_lie_within_the_trace(shape: str):
    arrivals = synthetic(shape, 20, 30)
    assert arrivals.dtype == np.float64
    assert (np.diff(arrivals) >= 0).all()
    assert 0 <= arrivals[0] <= arrivals[-1] < 30


@pytest.mark.parametrize("shape", RATES)
def test_the_same_seed_gives_the_same_arrivals(shape: str):
    np.testing.assert_array_equal(synthetic(shape, 20, 30), synthetic(shape, 20, 30, seed=0))
    other = synthetic(shape, 20, 30, seed=1)
    assert not np.isin(other, synthetic(shape, 20, 30)).any()


def test_the_rate_is_that_of_the_capacity():
    assert len(synthetic("steady", 200, 60)) == pytest.approx(8400, rel=0.04)
    assert len(synthetic("steady", 20, 60)) == pytest.approx(840, rel=0.1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0\n0.5\n1.25\n", [0, 0.5, 1.25]),
        ("1700000000.5\r\n1700000000.5\r\n1700000002", [0, 0, 1.5]),  # Unix time, two at once
        ("-3\n-1e0\n\n", [0, 2]),
        ("7", [0]),
    ],
)
def test_recorded_arrivals(tmp_path: Path, text: str, expected: list[float]):
    file = tmp_path / "arrivals.txt"
    file.write_bytes(text.encode())
    found = recorded(file)
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
        recorded(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_can_t_be_read(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.txt: can't be read: No such file"):
        recorded(tmp_path / "none.txt")
    with pytest.raises(InputError, match="can't be read"):
        recorded(tmp_path)


def test_a_huge_file(tmp_path: Path):
    file = tmp_path / "arrivals.txt"
    with file.open("wb") as stream:
        stream.truncate(100_000_001)
    with pytest.raises(InputError, match=r"arrivals\.txt is too large"):
        recorded(file)


def test_a_summary():
    found = outcome([0.1, 0.2, 0.3, 0.4], [0, 8, 8, 4], slo=0.3)
    assert found.to_json() == {
        "requests": 4, "met": 75, "mean_degree": 5, "p50_ms": pytest.approx(250),
        "p99_ms": pytest.approx(397), "switches": 2,
    }  # fmt: skip
    assert outcome([1.0], [16], slo=0.5).to_json() == {
        "requests": 1, "met": 0, "mean_degree": 16, "p50_ms": 1000, "p99_ms": 1000, "switches": 0,
    }  # fmt: skip


@pytest.fixture
def server() -> SimpleNamespace:
    """In place of a steering: r = 4 for the first two requests, r = 8 for the others."""
    loads: list[Load] = []
    times: list[tuple[int, float]] = []

    def step(state: State, load: Load) -> State:
        loads.append(load)
        return State(4 if len(loads) < 3 else 8)

    def measured(state: State, degree: int, seconds: float) -> State:
        times.append((degree, seconds))
        return state

    return SimpleNamespace(
        seconds={4: 0.5, 8: 0.25}, slo=0.75, start=lambda: State(4), step=step,
        measured=measured, loads=loads, times=times,
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
    assert server.times == [(4, 0.5), (4, 0.5), (8, 0.25), (8, 0.25), (8, 0.25)]
    # latencies: 0.5, 0.875, 0.75, 0.75, 0.25
    assert (found.requests, found.met, found.p50_ms) == (5, 80, 750)
    assert (found.mean_degree, found.switches) == (6.4, 1)


def test_a_slow_machine_is_measured_as_it_is(server: SimpleNamespace):
    """The slowdown is that of the moment when a request is begun."""
    slow: Callable[[float], float] = lambda now: 2.0 if now >= 1 else 1.0  # noqa: E731
    simulate(np.array([0, 0.75, 0.875, 1.5]), server, slow)
    assert server.times == [(4, 0.5), (4, 0.5), (8, 0.5), (8, 0.5)]
    assert [load.now for load in server.loads] == [0, 0.75, 1.25, 1.75]


def test_a_fixed_degree():
    fixed = Steering({0: 0.5, 8: 0.25}, 0.3, floor=8, ceiling=8)
    found = simulate(np.array([0.0, 0.25, 0.5, 0.5]), fixed)
    assert (found.mean_degree, found.met, found.switches) == (8, 75, 0)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tocom_export.engines.serving import arrivals as module
from tocom_export.engines.serving.arrivals import (
    TRACES,
    draw_arrivals,
    draw_gamma,
    draw_poisson,
    draw_traces,
    read_arrivals,
)
from tocom_export.errors import InputError

RATES = {
    "steady": [0.7] * 10,
    "burst": [0.5, 0.5, 1.5, 1.5, 0.5, 0.5, 1.5, 1.5, 0.5, 0.5],
    "ramp": [0.275, 0.425, 0.575, 0.725, 0.875, 1.025, 1.175, 1.325, 1.475, 1.625],
    "diurnal": [0.135, 0.332, 0.65, 0.968, 1.165, 1.165, 0.968, 0.65, 0.332, 0.135],
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
    monkeypatch.setattr(module, "TRACE_SECONDS", 4)
    traces = draw_traces({"fast": 0.001, "r00": 0.01})
    assert list(traces) == list(TRACES)
    assert traces["steady"][-1] == pytest.approx(20, rel=0.02)  # 2000 at 100 a second
    assert len(traces["steady"]) == pytest.approx(1400, rel=0.1)
    short = draw_traces({"fast": 0.0001, "r00": 0.001})
    assert short["steady"][-1] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("cv", [0.5, 1, 2, 8])
def test_clumps(cv: float):
    """The longer the clumps, the fewer there are to take a mean of."""
    arrivals = draw_gamma(1000, cv, 400)
    assert (np.diff(arrivals) >= 0).all()
    assert 0 <= arrivals[0] <= arrivals[-1] < 400
    gaps = np.diff(arrivals)
    assert len(arrivals) == pytest.approx(400_000, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)
    np.testing.assert_array_equal(arrivals, draw_gamma(1000, cv, 400, seed=0))
    assert not np.array_equal(arrivals, draw_gamma(1000, cv, 400, seed=1))


def test_a_single_clump_may_fill_the_trace():
    """Whatever was drawn, the trace is as long as it was asked for."""
    for seed in range(50):
        arrivals = draw_gamma(5, 8, 2, seed)
        assert (arrivals < 2).all()
    assert draw_gamma(1000, 8, 100)[-1] == pytest.approx(100, abs=5)


def test_a_rate_that_changes():
    arrivals = draw_poisson(lambda t: 2000 * (1 + t), 10)
    counts, _ = np.histogram(arrivals, 2, (0, 10))
    np.testing.assert_allclose(counts, [12500, 17500], rtol=0.03)

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tocom_export.engines.bench.plot import draw_speeds
from tocom_export.errors import InputError, MissingPackageError
from tocom_export.study.plot_style import save

SPEEDS = {
    32: {"r16": 50.0, "r00": 25.0, "fast": 40.0},
    1: {"r00": 20.0, "fast": 30.0, "r16": 35.0},
}
MACS = {"r16": 2.31e9, "r00": 4.6e9, "fast": 3.071e9}
LABELS = ["r00\n4.6 G", "fast\n3.07 G", "r16\n2.31 G"]
"""The costliest first."""
ACCURACY = {"r16": 78.0, "r00": 80.0}
PEERS = {"torch eager, dense": 22.0, "torch.compile, dense": 27.0}


@pytest.fixture(autouse=True)
def _needs_matplotlib(request: pytest.FixtureRequest) -> None:
    if "without_matplotlib" not in request.node.name:
        pytest.importorskip("matplotlib")


def labels(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def test_a_line_a_batch():
    (axes,) = draw_speeds(SPEEDS, MACS, {}, {}).axes
    one, many = axes.lines
    assert (one.get_label(), many.get_label()) == ("batch 1", "batch 32")
    assert list(one.get_xdata()) == list(many.get_xdata()) == [0, 1, 2]
    assert list(one.get_ydata()) == [20, 30, 35]
    assert list(many.get_ydata()) == [25, 40, 50]
    assert one.get_color() != many.get_color()
    assert one.get_marker() != many.get_marker()
    assert axes.get_title() == "images per second"
    assert labels(axes) == LABELS
    assert axes.get_ylim()[0] == 0  # or a difference would look like more than it is


def test_accuracy_beside_it_where_it_is_known():
    speed, accuracy = draw_speeds(SPEEDS, MACS, ACCURACY, {}).axes
    assert accuracy.get_title() == "accuracy, %"
    (line,) = accuracy.lines
    assert list(line.get_xdata()) == [0, 2]
    assert list(line.get_ydata()) == [80, 78]
    assert labels(accuracy) == labels(speed) == LABELS


def test_peers_are_broken_lines():
    (axes,) = draw_speeds(SPEEDS, MACS, {}, PEERS).axes
    eager, compiled = axes.lines[2:]
    assert set(eager.get_ydata()) == {22}
    assert set(compiled.get_ydata()) == {27}
    assert all(line.is_dashed() for line in (eager, compiled))
    assert not any(line.is_dashed() for line in axes.lines[:2])
    assert len({line.get_color() for line in axes.lines}) == 4
    legend = axes.get_legend()
    assert legend is not None
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["batch 1", "batch 32", *(f"{name}, batch 32" for name in PEERS)]


def test_more_lines_than_colours():
    speeds = {batch: {"r00": 10.0 + batch, "fast": 20.0 + batch} for batch in range(1, 8)}
    peers = PEERS | {f"peer {number}": 30.0 + number for number in range(10)}
    figure = draw_speeds(speeds, MACS, {}, peers)
    (axes,) = figure.axes
    assert len(axes.lines) == 19
    broken = [line for line in axes.lines if line.is_dashed()]
    assert len({(line.get_color(), str(vars(line)["_dash_pattern"])) for line in broken}) == 12
    assert axes.get_legend() is None
    (legend,) = figure.legends  # beside the lines
    assert len(legend.get_texts()) == 19


def test_one_variant_alone():
    speed, accuracy = draw_speeds({8: {"r04": 10.0}}, {"r04": 4e9}, {"r04": 70.0}, {}).axes
    assert labels(speed) == labels(accuracy) == ["r04\n4 G"]


def test_the_unit_of_small_models():
    (axes,) = draw_speeds({8: {"r00": 9.0, "r08": 10.0}}, {"r00": 84.1e6, "r08": 5e6}, {}, {}).axes
    assert labels(axes) == ["r00\n84.1 M", "r08\n5 M"]


def test_names_don_t_overlap():
    """Long ones are slanted, and many get a wider picture."""
    macs = {f"variant-{number:02d}": 1e9 - number for number in range(17)}
    figure = draw_speeds({1: dict.fromkeys(macs, 1.0)}, macs, {}, {})
    assert {label.get_rotation() for label in figure.axes[0].get_xticklabels()} == {30}
    assert figure.get_figwidth() > 7
    figure = draw_speeds(SPEEDS, MACS, {}, {})
    assert {label.get_rotation() for label in figure.axes[0].get_xticklabels()} == {0}


@pytest.mark.parametrize("accuracy", [{}, ACCURACY], ids=["without", "with"])
def test_the_suffix_says_the_type(accuracy: dict[str, float], tmp_path: Path):
    save(draw_speeds(SPEEDS, MACS, accuracy, PEERS), tmp_path / "new" / "a.png")
    save(draw_speeds(SPEEDS, MACS, accuracy, PEERS), tmp_path / "a.SVG")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.SVG").read_text("utf-8")
    with pytest.raises(InputError, match=r"a\.pdf: a picture is a \.png or a \.svg file"):
        save(draw_speeds(SPEEDS, MACS, accuracy, PEERS), tmp_path / "a.pdf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.SVG", "new"]


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_figures_give_the_same_bytes(name: str, tmp_path: Path):
    save(draw_speeds(SPEEDS, MACS, ACCURACY, PEERS), tmp_path / name)
    save(draw_speeds(SPEEDS, MACS, ACCURACY, PEERS), tmp_path / f"again-{name}")
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    assert b"dc:date" not in (tmp_path / name).read_bytes()
    save(draw_speeds(SPEEDS, MACS, {}, PEERS), tmp_path / f"other-{name}")
    assert (tmp_path / name).read_bytes() != (tmp_path / f"other-{name}").read_bytes()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"tocom-export\[plot\]"):
        save(draw_speeds(SPEEDS, MACS, {}, {}), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())

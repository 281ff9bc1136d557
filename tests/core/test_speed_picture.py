from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tocom_export.engines.bench.plot import speed_figure, speed_picture
from tocom_export.errors import InputError, MissingPackageError

ENGINES = {32: {16: 50.0, 0: 25.0, 8: 40.0}, 1: {0: 20.0, 8: 30.0, 16: 35.0}}
ACCURACY = {16: 78.0, 0: 80.0}
PEERS = {"torch eager, dense": 22.0, "torch.compile, dense": 27.0}


@pytest.fixture(autouse=True)
def _needs_matplotlib(request: pytest.FixtureRequest) -> None:
    if "without_matplotlib" not in request.node.name:
        pytest.importorskip("matplotlib")


def test_a_line_a_batch():
    (axes,) = speed_figure(ENGINES, {}, {}).axes
    one, many = axes.lines
    assert (one.get_label(), many.get_label()) == ("batch 1", "batch 32")
    assert list(one.get_xdata()) == list(many.get_xdata()) == [0, 8, 16]
    assert list(one.get_ydata()) == [20, 30, 35]
    assert list(many.get_ydata()) == [25, 40, 50]
    assert one.get_color() != many.get_color()
    assert one.get_marker() != many.get_marker()
    assert axes.get_title() == "images per second"
    assert list(axes.get_xticks()) == [0, 8, 16]
    assert axes.get_ylim()[0] == 0  # or a difference would look like more than it is


def test_accuracy_beside_it_where_it_is_known():
    speed, accuracy = speed_figure(ENGINES, ACCURACY, {}).axes
    assert accuracy.get_title() == "accuracy, %"
    (line,) = accuracy.lines
    assert list(line.get_xdata()) == [0, 16]
    assert list(line.get_ydata()) == [80, 78]
    assert list(accuracy.get_xticks()) == list(speed.get_xticks()) == [0, 8, 16]


def test_peers_are_broken_lines():
    (axes,) = speed_figure(ENGINES, {}, PEERS).axes
    eager, compiled = axes.lines[2:]
    assert set(eager.get_ydata()) == {22}
    assert set(compiled.get_ydata()) == {27}
    assert all(line.is_dashed() for line in (eager, compiled))
    assert not any(line.is_dashed() for line in axes.lines[:2])
    assert len({line.get_color() for line in axes.lines}) == 4
    legend = axes.get_legend()
    assert legend is not None
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["batch 1", "batch 32", *PEERS]


def test_more_lines_than_colours():
    engines = {batch: {0: 10.0 + batch, 8: 20.0 + batch} for batch in range(1, 8)}
    assert len(speed_figure(engines, {}, PEERS).axes[0].lines) == 9


def test_one_degree_alone():
    speed, accuracy = speed_figure({8: {4: 10.0}}, {4: 70.0}, {}).axes
    assert list(speed.get_xticks()) == list(accuracy.get_xticks()) == [4]


@pytest.mark.parametrize("accuracy", [{}, ACCURACY], ids=["without", "with"])
def test_the_suffix_says_the_type(accuracy: dict[int, float], tmp_path: Path):
    speed_picture(ENGINES, accuracy, PEERS, tmp_path / "new" / "a.png")
    speed_picture(ENGINES, accuracy, PEERS, tmp_path / "a.SVG")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.SVG").read_text("utf-8")
    with pytest.raises(InputError, match=r"a\.pdf: a picture is a \.png or a \.svg file"):
        speed_picture(ENGINES, accuracy, PEERS, tmp_path / "a.pdf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.SVG", "new"]


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_figures_give_the_same_bytes(name: str, tmp_path: Path):
    speed_picture(ENGINES, ACCURACY, PEERS, tmp_path / name)
    speed_picture(ENGINES, ACCURACY, PEERS, tmp_path / f"again-{name}")
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    assert b"dc:date" not in (tmp_path / name).read_bytes()
    speed_picture(ENGINES, {}, PEERS, tmp_path / f"other-{name}")
    assert (tmp_path / name).read_bytes() != (tmp_path / f"other-{name}").read_bytes()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"tocom-export\[plot\]"):
        speed_picture(ENGINES, {}, {}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tocom_export.errors import InputError, MissingPackageError
from tocom_export.study.plot_style import save
from tocom_export.study.plots import draw_accuracy, draw_throughput
from tocom_export.study.results import Row

WHITE, DASHED = "white", "--"


def make_rows(
    datasets: tuple[str, ...] = ("cifar",),
    sources: tuple[int, ...] = (0, 16),
    seeds: int = 1,
    method: str = "tome",
) -> list[Row]:
    rows = []
    for dataset in datasets:
        for source in sources:
            for target in (0, 8, 16):
                for seed in range(seeds):
                    baseline = 80.0 - abs(target - source) / 4 - seed
                    more = (None, None) if source == target else (baseline + 1, 81.0 - seed)
                    throughput = 100.0 + 10 * target
                    row = Row(dataset, method, source, target, baseline, *more, seed=seed)
                    rows.append(Row(**{**row.__dict__, "throughput": throughput}))
    return rows


@pytest.fixture(autouse=True)
def _needs_matplotlib(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        pytest.importorskip("matplotlib")


def test_a_panel_a_data_set_and_their_average():
    titles = [axes.get_title() for axes in draw_accuracy(make_rows(("a", "b"))).axes]
    assert titles == ["a", "b", "average of 2"]
    assert [axes.get_title() for axes in draw_accuracy(make_rows()).axes] == ["cifar"]


def test_two_methods_have_panels_of_their_own():
    figure = draw_accuracy(make_rows() + make_rows(method="evit"))
    assert [axes.get_title() for axes in figure.axes] == ["ToMe, cifar", "EViT, cifar"]


def test_two_lines_a_source_and_the_references():
    (axes,) = draw_accuracy(make_rows()).axes
    without, with_, _, _, stars = axes.lines
    assert list(without.get_xdata()) == list(with_.get_xdata()) == [0, 8, 16]
    assert list(without.get_ydata()) == [80, 78, 76]
    assert list(with_.get_ydata()) == [80, 79, 77]  # at its own degree the gap is nothing
    assert (without.get_markerfacecolor(), with_.get_markerfacecolor()) == (WHITE, "#0072B2")
    assert without.get_linestyle() == DASHED != with_.get_linestyle()
    assert (stars.get_linestyle(), stars.get_marker()) == ("None", "*")
    assert dict(zip(*stars.get_data(), strict=True)) == {0: 81, 8: 81, 16: 81}
    assert len({line.get_color() for line in axes.lines}) == 3
    assert list(axes.get_xticks()) == [0, 8, 16]


def test_the_legend_says_what_is_drawn():
    (legend,) = draw_accuracy(make_rows()).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "trained at degree 0",
        "trained at degree 16",
        "with ToCom",
        "compression alone",
        "trained at the target degree",
    ]


def test_no_stars_without_references():
    rows = [Row("cifar", "tome", 0, target, 70.0, 71.0, None, 0) for target in (8, 16)]
    figure = draw_accuracy(rows)
    assert len(figure.axes[0].lines) == 2
    assert len(figure.legends[0].get_texts()) == 3


def test_seeds_are_averaged_with_a_band():
    (axes,) = draw_accuracy(make_rows(sources=(0,), seeds=3)).axes
    assert list(axes.lines[0].get_ydata()) == [79, 77, 75]
    assert len(axes.collections) == 2
    assert len(draw_accuracy(make_rows(sources=(0,))).axes[0].collections) == 0


def test_the_average_has_only_what_every_data_set_has():
    rows = [row for row in make_rows(("a", "b")) if (row.dataset, row.target) != ("b", 8)]
    average = draw_accuracy(rows).axes[-1]
    assert list(average.lines[0].get_xdata()) == [0, 16]


def test_ablations_are_not_plotted():
    rows = make_rows() + [
        Row(**{**row.__dict__, "variant": "shared"}) for row in make_rows(("other",))
    ]
    assert [axes.get_title() for axes in draw_accuracy(rows).axes] == ["cifar"]


def test_schedules_are_not_plotted():
    fast = [
        Row(**{**row.__dict__, "target": None, "schedule": "fast"}) for row in make_rows(("other",))
    ]
    assert [axes.get_title() for axes in draw_accuracy(make_rows() + fast).axes] == ["cifar"]
    with pytest.raises(InputError, match="no rows to plot"):
        draw_accuracy(fast)


def test_accuracy_against_throughput():
    figure = draw_throughput(make_rows(("a", "b")))
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert len(axes.lines) == 4
        assert list(axes.lines[0].get_xdata()) == [100, 180, 260]
        assert sorted(text.get_text() for text in axes.texts) == ["0", "16", "8"]


def test_a_label_stands_at_the_highest_point_of_its_degree():
    (axes,) = draw_throughput(make_rows(sources=(0,))).axes
    places = {text.get_text(): text.xy for text in axes.texts}  # type: ignore[attr-defined]
    assert places == {"0": (100, 80), "8": (180, 79), "16": (260, 77)}


@pytest.mark.parametrize("draw", [draw_accuracy, draw_throughput])
def test_the_suffix_says_the_type(draw: Callable[[list[Row]], Any], tmp_path: Path):
    save(draw(make_rows()), tmp_path / "new" / "a.png")
    save(draw(make_rows()), tmp_path / "a.SVG")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.SVG").read_text("utf-8")
    with pytest.raises(InputError, match=r"a\.pdf: a picture is a \.png or a \.svg file"):
        save(draw(make_rows()), tmp_path / "a.pdf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.SVG", "new"]


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_rows_give_the_same_bytes(name: str, tmp_path: Path):
    save(draw_accuracy(make_rows(("a", "b"), seeds=2)), tmp_path / name)
    save(draw_accuracy(make_rows(("a", "b"), seeds=2)), tmp_path / f"again-{name}")
    assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()
    assert b"dc:date" not in (tmp_path / name).read_bytes()


def test_a_user_s_settings_stay_as_they_are(tmp_path: Path):
    import matplotlib

    loaded = "matplotlib.pyplot" in sys.modules
    with matplotlib.rc_context({"lines.linewidth": 7.0, "figure.facecolor": "black"}):
        save(draw_accuracy(make_rows()), tmp_path / "a.png")
        figure = draw_accuracy(make_rows())
        assert matplotlib.rcParams["lines.linewidth"] == 7.0
        assert figure.axes[0].lines[0].get_linewidth() < 7
        assert figure.get_facecolor() == (1, 1, 1, 1)
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_nothing_to_draw():
    with pytest.raises(InputError, match="no rows to plot"):
        draw_accuracy([])
    with pytest.raises(InputError, match="no rows to plot"):
        draw_throughput([Row("cifar", "tome", 0, 8, 70.0, 71.0, None, 0)])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"tocom-export\[plot\]"):
        save(draw_accuracy(make_rows()), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())

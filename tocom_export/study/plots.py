"""Plots of an accuracy study: accuracy against degree, and against throughput."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .plot_style import COLORS, MARKERS, apply_style
from .results import METHODS, Row
from .summary import Pair, Spread, average_pairs, group_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = {4: 2, 8: 4}  # else 3, or fewer panels than that
_Style = Mapping[str, Any]
_WITH: _Style = {"linestyle": "-"}
_WITHOUT: _Style = {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}
_MARK: _Style = {"color": "#222222", "markeredgewidth": 0, "linestyle": "none"}
_STAR: _Style = {**_MARK, "marker": "*", "markersize": 8}
_NUMBER: _Style = {**_MARK, "marker": "$12$", "markersize": 10}


@dataclass(frozen=True)
class _Panel:
    title: str
    pairs: Sequence[Pair]
    average: bool = False


def draw_accuracy(rows: Iterable[Row]) -> Figure:
    """Accuracy against target degree: a panel a data set, and their average if several.

    Each source degree has a line with ToCom and one without; stars are models trained at the
    target degree. Bands are one standard deviation over the seeds. Ablations, and schedules,
    which have no target degree, are not drawn.

    Raises:
        InputError: there are no rows to draw.
        MissingPackageError: matplotlib is not installed.
    """
    panels = _make_panels(rows)
    degrees = sorted({pair.target for panel in panels for pair in panel.pairs})

    def finish(axes: Axes, pairs: Sequence[Pair]) -> None:
        if trained := {pair.target: pair.reference[0] for pair in pairs if pair.reference}:
            axes.plot(list(trained), list(trained.values()), zorder=4, **_STAR)
        axes.set_xticks(degrees)

    has_stars = any(pair.reference for panel in panels for pair in panel.pairs)
    stars = {"trained at the target degree": _STAR} if has_stars else {}
    label = "target degree: tokens removed in each layer"
    return _draw_panels(panels, lambda pair: pair.target, finish, label, stars)


def draw_throughput(rows: Iterable[Row]) -> Figure:
    """Accuracy against measured throughput: panels, lines and errors as of :func:`draw_accuracy`.

    The number above a point is its target degree. Rows without a throughput are left out.
    """

    def place(pair: Pair) -> float | None:
        return pair.throughput and pair.throughput[0]

    def finish(axes: Axes, pairs: Sequence[Pair]) -> None:
        highest: dict[int, tuple[float, float]] = {}  # one label a degree: its runs are as fast
        for pair in pairs:
            y = max(pair.baseline[0], (_get_tocom(pair) or pair.baseline)[0])
            highest[pair.target] = max((y, place(pair) or 0), highest.get(pair.target, (0, 0)))
        for degree, (y, x) in highest.items():
            axes.annotate(
                str(degree), (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        axes.margins(y=0.15)  # room for the labels

    panels = _make_panels(row for row in rows if row.throughput is not None)
    return _draw_panels(panels, place, finish, "images per second", {"target degree": _NUMBER})


def _make_panels(rows: Iterable[Row]) -> list[_Panel]:
    """A panel for each method and data set, and the average of a method's data sets."""
    methods = group_rows(
        (row for row in rows if row.variant == "tocom" and row.target is not None), "method"
    )
    panels = []
    for method, own in methods.items():
        datasets = group_rows(own, "dataset")
        prefix = f"{METHODS[method]}, " if len(methods) > 1 else ""
        panels += [_Panel(prefix + name, average_pairs(of)) for name, of in datasets.items()]
        if len(datasets) > 1:
            # a pair that a data set lacks would bend the line where the average changes its base
            shown = [pair for pair in average_pairs(own) if len(pair.datasets) == len(datasets)]
            panels.append(_Panel(f"{prefix}average of {len(datasets)}", shown, True))
    if not panels:
        raise InputError("there are no rows to plot.")
    return panels


def _draw_panels(
    panels: Sequence[_Panel],
    place: Callable[[Pair], float | None],
    finish: Callable[[Axes, Sequence[Pair]], None],
    label: str,
    legend: Mapping[str, _Style],
) -> Figure:
    """A figure of the panels' lines.

    Args:
        place: where a pair stands on the horizontal axis.
        finish: adds to a panel what is not a line.
        label: of the horizontal axis.
        legend: what it holds beside the lines.
    """
    sources = sorted({pair.source for panel in panels for pair in panel.pairs})
    styles: dict[int, _Style] = {
        source: {"color": COLORS[index % 6], "marker": MARKERS[index % 6]}
        for index, source in enumerate(sources)
    }
    columns = _COLUMNS.get(len(panels), min(len(panels), 3))
    lines = math.ceil(len(panels) / columns)
    with apply_style():
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        size = (3.2 * max(columns, 1.5), 2.5 * lines + 1.1)
        figure = Figure(figsize=size, layout="constrained")
        for number, panel in enumerate(panels, 1):
            axes = figure.add_subplot(lines, columns, number)
            axes.set_title(panel.title, fontweight="bold" if panel.average else "normal")
            for source, style in styles.items():
                if own := [pair for pair in panel.pairs if pair.source == source]:
                    _draw_line(axes, own, place, lambda pair: pair.baseline, {**style, **_WITHOUT})
                    _draw_line(axes, own, place, _get_tocom, {**style, **_WITH})
            finish(axes, panel.pairs)
        figure.supxlabel(label, fontsize=9)
        figure.supylabel("accuracy, %", fontsize=9)
        entries = {f"trained at degree {source}": style for source, style in styles.items()}
        entries["with ToCom"] = {"color": "#666666", "marker": "o", **_WITH}
        entries["compression alone"] = {"color": "#666666", "marker": "o", **_WITHOUT}
        handles = [Line2D([], [], label=t, **style) for t, style in {**entries, **legend}.items()]
        ncols = max(2, min(columns, 3))
        figure.legend(handles=handles, loc="outside upper center", ncols=ncols)
    return figure


def _draw_line(
    axes: Axes,
    pairs: Sequence[Pair],
    place: Callable[[Pair], float | None],
    value: Callable[[Pair], Spread | None],
    style: _Style,
) -> None:
    """The means of some pairs, over their spreads."""
    points = sorted(
        (x, *y) for p in pairs if (x := place(p)) is not None and (y := value(p)) is not None
    )
    places = [point[0] for point in points]
    axes.plot(places, [mean for _, mean, _ in points], **style)
    if any(spread for *_, spread in points):
        low = [mean - (spread or 0) for _, mean, spread in points]
        high = [mean + (spread or 0) for _, mean, spread in points]
        axes.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _get_tocom(pair: Pair) -> Spread | None:
    """At its own degree a model needs no compensation, so that both lines meet there."""
    return pair.baseline if pair.source == pair.target else pair.tocom

"""Pictures of an accuracy study: accuracy against degree, and against throughput."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .plot_style import COLORS, MARKERS, look, save
from .results import METHODS, Row
from .summary import Pair, Spread, pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = {4: 2, 8: 4}  # else 3, or fewer panels than that
_NUMBER: Mapping[str, Any] = {
    "color": "#222222", "marker": "$12$", "markersize": 10, "markeredgewidth": 0,
    "linestyle": "none",
}  # fmt: skip
_Styles = Mapping[int, Mapping[str, Any]]
_WITH: Mapping[str, Any] = {"linestyle": "-"}
_WITHOUT: Mapping[str, Any] = {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}
_STAR: Mapping[str, Any] = {
    "color": "#222222", "marker": "*", "markersize": 8, "markeredgewidth": 0, "linestyle": "none",
}  # fmt: skip


@dataclass(frozen=True)
class _Panel:
    title: str
    pairs: Sequence[Pair]
    average: bool = False


def accuracy_picture(rows: Iterable[Row], file: Path) -> None:
    """Write :func:`accuracy_figure` to a PNG or SVG file.

    Raises:
        InputError: another suffix, or no rows.
        MissingPackageError: matplotlib is not installed.
        OutputError: the file can't be written.
    """
    save(partial(accuracy_figure, rows), file)


def throughput_picture(rows: Iterable[Row], file: Path) -> None:
    """Write :func:`throughput_figure` to a PNG or SVG file.

    Raises:
        InputError: another suffix, or no rows with a throughput.
        MissingPackageError: matplotlib is not installed.
        OutputError: the file can't be written.
    """
    save(partial(throughput_figure, rows), file)


def accuracy_figure(rows: Iterable[Row]) -> Figure:
    """Accuracy against target degree: a panel a data set, and their average if several.

    Each source degree has a line with ToCom and one without; stars are models trained at the
    target degree. Bands are one standard deviation over the seeds. Ablations are not drawn.
    """
    panels = _panels(rows)
    degrees = sorted({pair.target for panel in panels for pair in panel.pairs})

    def draw(axes: Axes, panel: _Panel, styles: _Styles) -> None:
        _lines(axes, panel, styles, lambda pair: pair.target)
        trained = {pair.target: pair.reference[0] for pair in panel.pairs if pair.reference}
        if trained:
            axes.plot(list(trained), list(trained.values()), zorder=4, **_STAR)
        axes.set_xticks(degrees)

    referenced = any(pair.reference for panel in panels for pair in panel.pairs)
    stars = {"trained at the target degree": _STAR} if referenced else {}
    return _figure(panels, draw, "target degree: tokens removed in each layer", stars)


def throughput_figure(rows: Iterable[Row]) -> Figure:
    """Accuracy against measured throughput: panels and lines as in :func:`accuracy_figure`.

    The number above a point is its target degree. Rows without a throughput are left out.
    """
    panels = _panels(row for row in rows if row.throughput is not None)

    def draw(axes: Axes, panel: _Panel, styles: _Styles) -> None:
        _lines(axes, panel, styles, lambda pair: pair.throughput)
        highest: dict[int, tuple[float, float]] = {}  # one label a degree: its runs are as fast
        for pair in panel.pairs:
            y = max(mean for mean, _ in (pair.baseline, _tocom(pair) or pair.baseline))
            highest[pair.target] = max(
                (y, pair.throughput or 0.0), highest.get(pair.target, (0, 0))
            )
        for degree, (y, x) in highest.items():
            axes.annotate(
                str(degree), (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        axes.margins(y=0.15)  # room for the labels

    return _figure(panels, draw, "images per second", {"target degree": _NUMBER})


def _panels(rows: Iterable[Row]) -> list[_Panel]:
    """A panel for each method and data set, and the average of a method's data sets."""
    rows = [row for row in rows if row.variant == "tocom"]
    methods = list(dict.fromkeys(row.method for row in rows))
    panels = []
    for method in methods:
        own = [row for row in rows if row.method == method]
        datasets = list(dict.fromkeys(row.dataset for row in own))
        prefix = f"{METHODS[method]}, " if len(methods) > 1 else ""
        for dataset in datasets:
            shown = pairs(row for row in own if row.dataset == dataset)
            panels.append(_Panel(prefix + dataset, shown))
        if len(datasets) > 1:
            # a pair that a data set lacks would bend the line where the average changes its base
            shown = [pair for pair in pairs(own) if len(pair.datasets) == len(datasets)]
            panels.append(_Panel(f"{prefix}average of {len(datasets)}", shown, True))
    if not panels:
        raise InputError("there are no rows to draw a picture of.")
    return panels


def _figure(
    panels: Sequence[_Panel],
    draw: Callable[[Axes, _Panel, _Styles], None],
    label: str,
    legend: Mapping[str, Mapping[str, Any]],
) -> Figure:
    sources = sorted({pair.source for panel in panels for pair in panel.pairs})
    styles = {
        source: {"color": COLORS[index % 6], "marker": MARKERS[index % 6]}
        for index, source in enumerate(sources)
    }
    columns = _COLUMNS.get(len(panels), min(len(panels), 3))
    lines = math.ceil(len(panels) / columns)
    with look():
        from matplotlib.figure import Figure

        size = (3.2 * max(columns, 1.5), 2.5 * lines + 1.1)
        figure = Figure(figsize=size, layout="constrained")
        for number, panel in enumerate(panels, 1):
            axes = figure.add_subplot(lines, columns, number)
            axes.set_title(panel.title, fontweight="bold" if panel.average else "normal")
            draw(axes, panel, styles)
        figure.supxlabel(label, fontsize=9)
        figure.supylabel("accuracy, %", fontsize=9)
        _legend(figure, styles, legend, max(2, min(columns, 3)))
    return figure


def _lines(
    axes: Axes, panel: _Panel, styles: _Styles, place: Callable[[Pair], float | None]
) -> None:
    """Per source a full line with ToCom and a broken one without, over their spreads."""
    for source in sorted({pair.source for pair in panel.pairs}):
        own = [pair for pair in panel.pairs if pair.source == source]
        for value, style in ((_baseline, _WITHOUT), (_tocom, _WITH)):
            points = sorted(
                (x, *y) for p in own if (x := place(p)) is not None and (y := value(p)) is not None
            )
            places = [point[0] for point in points]
            axes.plot(places, [mean for _, mean, _ in points], **styles[source], **style)
            if any(spread for *_, spread in points):
                low = [mean - (spread or 0) for _, mean, spread in points]
                high = [mean + (spread or 0) for _, mean, spread in points]
                color = styles[source]["color"]
                axes.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)


def _baseline(pair: Pair) -> Spread:
    return pair.baseline


def _tocom(pair: Pair) -> Spread | None:
    """At its own degree a model needs no compensation, so that both lines meet there."""
    return pair.baseline if pair.source == pair.target else pair.tocom


def _legend(
    figure: Figure, styles: _Styles, more: Mapping[str, Mapping[str, Any]], columns: int
) -> None:
    from matplotlib.lines import Line2D

    entries = {f"trained at degree {source}": style for source, style in styles.items()}
    entries["with ToCom"] = {"color": "#666666", "marker": "o", **_WITH}
    entries["compression alone"] = {"color": "#666666", "marker": "o", **_WITHOUT}
    entries.update(more)
    handles = [Line2D([], [], label=label, **style) for label, style in entries.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)

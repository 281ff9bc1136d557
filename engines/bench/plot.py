"""A picture of a benchmark: throughput, and accuracy where it is known, against cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tocom_export.study.plot_style import COLORS, MARKERS, apply_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Speeds = Mapping[int, Mapping[str, float]]
"""Batch → variant → images a second."""

_DASHES = ((4, 2), (1, 1.2), (6, 2, 1, 2))


def draw_speeds(
    speeds: Speeds,
    macs: Mapping[str, float],
    accuracy: Mapping[str, float],
    peers: Mapping[str, float],
) -> Figure:
    """Images a second of the variants, the costliest first, a line a batch; beside it accuracy.

    Args:
        macs: variant → multiply-adds per image; those of ``speeds``.
        accuracy: variant → top-1 accuracy in percent, of those where it is known.
        peers: what else was timed at the largest batch → images a second; broken lines.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    order = sorted(macs, key=lambda name: -macs[name])
    unit, size = ("G", 1e9) if macs[order[0]] >= 1e9 else ("M", 1e6)
    labels = [f"{name}\n{macs[name] / size:.3g} {unit}" for name in order]

    def draw_line(axes: Axes, values: Mapping[str, float], **style: Any) -> None:
        places = [place for place, name in enumerate(order) if name in values]
        axes.plot(places, [values[order[place]] for place in places], **style)

    with apply_style():
        from matplotlib.figure import Figure

        panels = 1 + bool(accuracy)
        width = max(4.6, 0.45 * len(order))
        figure = Figure(figsize=(width * panels, 3.4), layout="constrained")
        axes = figure.add_subplot(1, panels, 1, title="images per second")
        for index, (batch, found) in enumerate(sorted(speeds.items())):
            color, marker = COLORS[index % 6], MARKERS[index % 6]
            draw_line(axes, found, color=color, marker=marker, label=f"batch {batch}")
        for index, (name, throughput) in enumerate(peers.items(), len(speeds)):
            dashes = (0, _DASHES[index // 6 % 3])
            label = f"{name}, batch {max(speeds)}"
            axes.axhline(throughput, color=COLORS[index % 6], linestyle=dashes, label=label)
        axes.set_ylim(bottom=0)
        if len(speeds) + len(peers) <= 6:
            axes.legend(fontsize=7)
        else:  # it would hide the lines
            figure.set_figwidth(figure.get_figwidth() + 2.8)
            figure.legend(fontsize=7, loc="outside right upper")
        if accuracy:
            beside = figure.add_subplot(1, panels, 2, title="accuracy, %")
            draw_line(beside, accuracy, color="#222222", marker="o")
        for axes in figure.axes:
            slanted = max(map(len, order)) > 8
            axes.set_xticks(range(len(order)), labels, rotation=30 if slanted else 0)
            axes.set_xlim(-0.5, len(order) - 0.5)
        figure.supxlabel("variant, and its MACs per image", fontsize=9)
    return figure

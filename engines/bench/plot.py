"""A picture of a benchmark: throughput, and accuracy where it is known, against degree."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tocom_export.study.plot_style import COLORS, MARKERS, look, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Throughputs = Mapping[int, Mapping[int, float]]
"""Batch → degree → images a second."""


def speed_picture(
    engines: Throughputs, accuracy: Mapping[int, float], peers: Mapping[str, float], file: Path
) -> None:
    """Write :func:`speed_figure` to a PNG or SVG file.

    Raises:
        InputError: another suffix.
        MissingPackageError: matplotlib is not installed.
        OutputError: the file can't be written.
    """
    save(partial(speed_figure, engines, accuracy, peers), file)


def speed_figure(
    engines: Throughputs, accuracy: Mapping[int, float], peers: Mapping[str, float]
) -> Figure:
    """Images a second against degree, a line a batch; beside it accuracy, where it is known.

    Args:
        accuracy: degree → top-1 accuracy in percent.
        peers: what else was timed at the largest batch → images a second; broken lines.
    """
    with look():
        from matplotlib.figure import Figure

        panels = 1 + bool(accuracy)
        figure = Figure(figsize=(4.6 * panels, 3.4), layout="constrained")
        axes = figure.add_subplot(1, panels, 1)
        for index, (batch, found) in enumerate(sorted(engines.items())):
            axes.plot(
                sorted(found),
                [found[degree] for degree in sorted(found)],
                color=COLORS[index % 6],
                marker=MARKERS[index % 6],
                label=f"batch {batch}",
            )
        for index, (name, throughput) in enumerate(peers.items()):
            color = COLORS[(len(engines) + index) % 6]
            axes.axhline(throughput, color=color, linestyle=(0, (4, 2)), label=name)
        degrees = sorted({degree for found in engines.values() for degree in found})
        axes.set_xticks(degrees)
        axes.set_ylim(bottom=0)
        axes.set_title("images per second")
        axes.legend(fontsize=7)
        if accuracy:
            other = figure.add_subplot(1, 2, 2)
            known = sorted(accuracy)
            other.plot(known, [accuracy[degree] for degree in known], color="#222222", marker="o")
            other.set_xticks(degrees)
            other.set_title("accuracy, %")
        figure.supxlabel("degree: tokens removed in each layer", fontsize=9)
    return figure

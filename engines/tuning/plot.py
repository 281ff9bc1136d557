"""A picture of a search: cost against divergence, what was tried beside constant degrees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tocom_export.io.atomic import replace_file
from tocom_export.study.plot_style import COLORS, apply_style

from .budget import Found


def draw_search(found: Sequence[Found], file: Path) -> None:
    """A panel for each budget; the file's name says of what kind the picture is.

    Raises:
        MissingPackageError: matplotlib isn't installed.
    """
    with apply_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.6 * len(found), 3.0), layout="constrained")
        for number, one in enumerate(found, 1):
            axes = figure.add_subplot(1, len(found), number)
            axes.set_title(one.variant.name)
            for index, kind in enumerate(("found", "constant")):
                points = sorted((cost, loss) for k, cost, loss in one.points if k == kind)
                style = "o-" if kind == "constant" else "."
                label = "constant degrees" if kind == "constant" else "tried"
                axes.plot(*zip(*points, strict=True), style, color=COLORS[index], label=label, ms=4)
            axes.set_xlabel("MACs" if one.median_ms is None else "ms, foretold")
            axes.set_ylabel("divergence")
            axes.legend()
        with replace_file(file) as beside:
            figure.savefig(beside, format=file.suffix.lstrip(".") or "png")

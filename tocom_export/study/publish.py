"""The folder that a study is published in: its document, and what is made of it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from ..errors import InputError
from ..io.atomic import replace_file
from ..io.json_codec import LATER
from ..loading import is_installed
from .markdown import format_page
from .plot_style import save
from .plots import draw_accuracy, draw_throughput
from .results import Results, Row

RESULTS, TABLE, PAGE = "results.json", "results.csv", "results.md"
_PLOTS = (
    ("Accuracy against target degree", "accuracy.svg", draw_accuracy),
    ("Accuracy against throughput", "throughput.svg", draw_throughput),
)


def open_results(out: Path, *, required: bool = True) -> Results:
    """What a study's folder holds so far.

    Raises:
        InputError: it is no folder, it has no results though ``required``, or they are broken.
    """
    file = out / RESULTS
    if out.exists() and not out.is_dir():
        raise InputError(f"`out` {out} is no folder; name another.")
    if required and not file.exists():
        raise InputError(f"`out` {out} holds no {RESULTS}; name a checkpoint or a bundle, too.")
    return Results.load(file) if file.exists() else Results()


def publish(
    out: Path, rows: Sequence[Row] = (), *, tell: Callable[[str], None] = lambda _: None
) -> Results:
    """Add rows to a folder's results; write a table, a page and, with matplotlib, plots of all.

    Args:
        tell: called with what was written, and with what is missing.

    Raises:
        InputError: as :func:`open_results` says.
        OutputError: a file can't be written.
    """
    results = open_results(out, required=not rows)
    if rows:
        results = results.merge(rows)
        results.save(out / RESULTS)
    with replace_file(out / TABLE) as new, new.open("w", encoding="utf-8", newline="") as file:
        derived = ("accuracy", "accuracy_low", "accuracy_high")
        names = [
            field.name
            for field in fields(Row)  # as in the document, later ones where a row has them
            if field.metadata != LATER
            or any(getattr(row, field.name) != field.default for row in results.rows)
        ]
        writer = csv.DictWriter(file, [*names, *derived], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**asdict(row), **row.describe_accuracy()} for row in results.rows)
    by_head = [row for row in results.rows if row.neighbours is None]
    plots = _write_plots(by_head, out, tell)
    with replace_file(out / PAGE) as beside:
        beside.write_text(format_page(results, plots), "utf-8")
    tell(f"Wrote {', '.join((str(out / RESULTS), TABLE, PAGE, *plots.values()))}.")
    return results


def _write_plots(rows: Sequence[Row], out: Path, tell: Callable[[str], None]) -> dict[str, str]:
    """Caption → file of what can be drawn."""
    if not is_installed("matplotlib"):
        tell("No plots: matplotlib is not installed (pip install 'tocom-export[plot]').")
        return {}
    plots = {}
    for caption, name, draw in _PLOTS:
        with suppress(InputError):  # there are no rows for it
            save(draw(rows), out / name)
            plots[caption] = name
    return plots

"""The tables of ``bench``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from .options import format_megabytes
from .output import Output

if TYPE_CHECKING:
    from tocom_export.engines.bench.picking import Pick
    from tocom_export.engines.bench.report import Report


def print_report(report: Report, document: Mapping[str, Any], output: Output) -> None:
    """The tables of what ``--json`` holds, and a word on what they lack."""
    rows = document["rows"]
    backends = dict.fromkeys(row["backend"] for row in rows if not row["peer"])
    title = f"{report.bundle.path}, {', '.join(backends)}"
    columns = ["", "backend", "precision", "batch", "median ms", "10 to 90 %", "p99 ms", "images/s"]
    columns += [f"over {report.dense or 'r00'}", "of bound", "MACs saved", "memory"]
    output.table(columns, [_format_row(row) for row in rows], f"{title}, on {report.device}")
    for name, layers in document["layers"].items():
        rows = [[x["name"][:60], f"{x['average_ms']:.3f}", f"{x['share']:.1f} %"] for x in layers]
        output.table(["layer", "ms", "share"], rows, name)
    columns = ["", "in time", "answered by", "accuracy", "median ms", "p99 ms", "switches"]
    for trace, found in document["steering"].items():
        title = f"{trace}, {found['steered']['requests']} requests, simulated with these times"
        outcomes = {"steered": found["steered"], **found["fixed"]}
        rows = [_format_outcome(name, outcome) for name, outcome in outcomes.items()]
        output.table(columns, rows, title)
    for line in report.not_timed:
        output.note(f"Not timed: {line}")
    if report.dense is None:
        output.note("No variant of degree 0 was timed to compare with.")
    for row in report.rows:
        if report.is_slower(row):
            output.note(
                f"{row.name} ({row.backend}, {row.precision}) is slower than {report.dense} at "
                f"batch {row.timing.batch}: removing tokens pays when the batch fills the device."
            )


def print_pick(picked: Pick, output: Output) -> None:
    """What was chosen, on stdout where no document is, and why the others were not."""
    for line in picked.explain():
        (output.note if output.as_json else click.echo)(line)


def _format_row(row: Mapping[str, Any]) -> list[object]:
    bound, of_bound = row["bound"], row["of_bound"]
    return [
        row["name"],
        row["backend"],
        row["precision"],
        row["batch"],
        f"{row['median_ms']:.2f}",
        f"{row['low_ms']:.2f} to {row['high_ms']:.2f}",
        f"{row['p99_ms']:.2f}",
        f"{row['images_per_s']:.1f}",
        f"{row['speed_up']:.2f}×" if row["speed_up"] else "-",
        f"{100 * of_bound:.0f} %" if of_bound and bound != 1 else "-",
        f"{100 - 100 / bound:.0f} %" if bound else "-",
        format_megabytes(row["memory"]) if row["memory"] else "-",
    ]


def _format_outcome(name: str, outcome: Mapping[str, Any]) -> list[object]:
    return [
        name,
        f"{outcome['met']:.1f} %",
        ", ".join(f"{variant} {share:.1f} %" for variant, share in outcome["shares"].items()),
        "-" if outcome["accuracy"] is None else f"{outcome['accuracy']:.1f} %",
        f"{outcome['p50_ms']:.1f}",
        f"{outcome['p99_ms']:.1f}",
        outcome["switches"],
    ]

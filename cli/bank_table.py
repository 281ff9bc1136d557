"""What a bank gives on the images of ``--val``, as ``train`` tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .output import Output

if TYPE_CHECKING:
    from tocom_export.training.bank_report import BankReport, PairReport


def show_bank(report: BankReport, data: str, output: Output) -> None:
    """The table, and a line where the bank changes nothing."""
    kl = report.measure == "kl"
    distance = "divergence" if kl else "distance"
    columns = ["degrees", distance, f"{distance} with bank"]
    if report.pairs[0].scores:
        columns += ["top-1 of teacher", "top-1", "top-1 with bank"]
    what = "KL from the teacher, nats" if kl else "features' L1 distance from the teacher"
    rows = [_make_row(pair) for pair in report.pairs]
    output.table(columns, rows, f"{data}, {report.images} images; {what}")
    if report.doubt:
        output.note(report.doubt)


def _make_row(pair: PairReport) -> list[str]:
    from tocom_export.study.accuracy import format_accuracy

    row = [pair.label, f"{pair.without:.4f}", f"{pair.compensated:.4f}"]
    if pair.scores:
        row += [format_accuracy(score.accuracy, score.total) for score in pair.scores]
    return row

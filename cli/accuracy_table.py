"""Engines' accuracies beside PyTorch's, as ``verify`` and ``evaluate`` tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .output import Output

if TYPE_CHECKING:
    from tocom_export.engines.accuracy import AccuracyCheck


def show_checks(checks: Sequence[tuple[str, AccuracyCheck]], data: str, output: Output) -> None:
    """The table of some engines, each with its bundle's name, and what qualifies the figures.

    Args:
        data: what was run.
    """
    from tocom_export.engines.accuracy import ALLOWED_LOSS
    from tocom_export.study.accuracy import format_accuracy

    rows = []
    for bundle, check in checks:
        images, difference = check.engine.total, check.difference
        low, high = difference.interval
        row = (
            bundle,
            check.variant,
            check.precision,
            check.backend,
            format_accuracy(check.engine.accuracy, images),
            format_accuracy(check.pytorch.accuracy, images),
            f"{difference.points:+.2f}",
            f"{low:+.2f} to {high:+.2f}",
            f"{check.agreement:.1f} %",
            "passed" if check.passed else "FAILED",
        )
        rows.append(row)
    columns = ("bundle", "variant", "precision", "backend", "accuracy", "PyTorch", "difference",
               "95 % interval", "same top-1", "")  # fmt: skip
    output.table(columns, rows, f"{data} against PyTorch, {checks[0][1].engine.total} images")
    rounded = [check for _, check in checks if check.stored_as != "fp32"]
    if rounded:
        names = ", ".join(dict.fromkeys(check.variant for check in rounded))
        output.note(
            f"PyTorch ran {names} with the bundle's own weights, rounded to "
            f"{rounded[0].stored_as}: what the rounding costs is not in the difference."
        )
    if doubtful := [check for _, check in checks if check.doubtful]:
        names = ", ".join(dict.fromkeys(check.variant for check in doubtful))
        output.note(
            f"{doubtful[0].engine.total} images can't rule out that {names} lose more than "
            f"{ALLOWED_LOSS} points; more would narrow the interval."
        )

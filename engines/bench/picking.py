"""Measuring which backend runs a bundle fastest on this machine, within a budget of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import InputError
from tocom_export.study.accuracy import Score, measure_accuracy

from ..accuracy import run_in_parts
from ..opening import open_engine
from ..picking import Choice, check_can_keep, keep_pick
from .report import Report
from .run import choose_variants, time_bundle

MAX_LOSS = 0.3
"""Points of accuracy that a choice may lose against the first one, on each variant."""


@dataclass(frozen=True)
class Candidate:
    """One choice, and how right it was where labelled images were given."""

    choice: Choice
    scores: dict[str, Score]
    """By variant; empty without images."""
    loss: float | None
    """Points that its worst variant loses against the first choice's; None without images."""


@dataclass(frozen=True)
class Pick:
    """What was measured, and what was chosen."""

    report: Report
    candidates: Sequence[Candidate]
    choice: Choice

    def explain(self) -> list[str]:
        """Lines for people, what was chosen last."""
        losses = [(c.choice, c.loss) for c in self.candidates if c.loss is not None]
        lines = [f"{choice}: its worst variant loses {loss:.2f} points." for choice, loss in losses]
        unless = "" if losses else " Accuracy was not compared: no labelled images."
        picked = f"Picked {self.choice}: what auto is for this bundle here.{unless}"
        rivals = [" in ".join(kind) for kind in self.report.find_rivals(self.report.fastest)]
        if rivals:
            lines.append(
                f"Times scatter more than those of {self.choice} and {', '.join(rivals)} differ: "
                "another time it may be another."
            )
        return [*lines, picked]

    def to_json(self) -> dict[str, Any]:
        """What was chosen, and why the others were not."""
        candidates = [
            {
                **found.choice.options,
                "loss": found.loss,
                "accuracy": {name: score.accuracy for name, score in found.scores.items()},
            }
            for found in self.candidates
        ]
        return {"choice": self.choice.options, "candidates": candidates}


def pick(
    bundle: Bundle,
    choices: Sequence[Choice],
    variants: Iterable[str | int] | None = None,
    *,
    data: Iterable[tuple[Any, Any]] | None = None,
    max_loss: float = MAX_LOSS,
    advance: Callable[[int], None] = lambda images: None,
    **options: Any,
) -> Pick:
    """Time a bundle on each choice, and let ``auto`` stand for the fastest from now on.

    The fastest has the smallest product of median times over variants and batches.

    Args:
        data: labelled images, batch by batch; without them, accuracy is not asked for.
        max_loss: points of accuracy that a variant may lose against the first choice.
        advance: called with the number of labelled images of each batch that is done.
        options: of :func:`~.run.time_bundle`.

    Raises:
        OutputError: the machine's cache can't be written.
        TocomError: what opening engines raises.
    """
    if not max_loss >= 0:
        raise InputError(f"`max_loss` {max_loss}: points of accuracy are expected.")
    check_can_keep(bundle)  # before the work, not after it
    names = choose_variants(bundle, variants)
    scores = _score(bundle, choices, names, data, advance)
    candidates = [
        Candidate(choice, own, _find_loss(own, scores[0]))
        for choice, own in zip(choices, scores, strict=True)
    ]
    left = [c.choice for c in candidates if c.loss is None or c.loss <= max_loss]
    report = time_bundle(bundle, names, choices=left, **options)
    if len(report.kinds) != len(left):
        raise InputError("two of the choices come to the same backend and precision.")
    choice = left[report.kinds.index(report.fastest)]
    keep_pick(bundle, choice)
    return Pick(report, candidates, choice)


def _score(
    bundle: Bundle,
    choices: Sequence[Choice],
    names: Sequence[str],
    data: Iterable[tuple[Any, Any]] | None,
    advance: Callable[[int], None],
) -> list[dict[str, Score]]:
    """Of each choice, how right its variants are; engines are let go of before any is timed."""
    if data is None:
        return [{} for _ in choices]
    pairs = [(choice, name) for choice in choices for name in names]
    bundle.find_output("logits")
    engines = [open_engine(bundle, bundle.variant(n), **c.options) for c, n in pairs]
    runs = [run_in_parts(engine, "logits") for engine in engines]
    found = iter(measure_accuracy(runs, data, advance))
    return [{name: next(found) for name in names} for _ in choices]


def _find_loss(own: dict[str, Score], first: dict[str, Score]) -> float | None:
    """Points that the worst variant loses; None without images."""
    return max((first[name].accuracy - own[name].accuracy for name in own), default=None)

"""What a trained bank gives: the student beside its teacher, on images of no training step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tocom_export.errors import DataError
from tocom_export.export_checks import Progress
from tocom_export.loading import Model
from tocom_export.study.accuracy import Run, Score, measure_accuracy
from tocom_export.study.subject import Batches, check_classes

from .data.loose_images import UNLABELLED
from .distill import Loss, measure_distance
from .lora import TrainableBank
from .model import CompressedVit
from .torch_engine import make_runner

PAIRS = ((0, 8), (0, 16), (16, 0))
"""Source and target degrees: half the way, all of it, and all of it back."""
_SLIVER = 0.01
"""Share of a distance that is none to speak of."""


@dataclass(frozen=True)
class PairReport:
    """The student at a target degree, held against the teacher at the source degree."""

    source: int
    target: int
    without: float
    """Distance from the teacher without the bank, a mean over the images."""
    compensated: float
    """The same with the bank."""
    scores: tuple[Score, Score, Score] | None
    """What the teacher says of labelled images, and the student without and with the bank.

    The student takes after its teacher: from 16 to 0 it loses what a model that was trained at 0
    is better there.
    """

    @property
    def label(self) -> str:
        """Its degrees for people: ``0 → 8``."""
        return f"{self.source} → {self.target}"

    @property
    def helped(self) -> bool:
        """Whether the bank lowers the distance by more than a sliver, 1 % of it."""
        return self.compensated < (1 - _SLIVER) * self.without


@dataclass(frozen=True)
class BankReport:
    """What a bank gives at some pairs of degrees."""

    measure: Loss
    """Of the distances: ``kl``, nats from the teacher's classes to the student's; ``features``,
    of a model without a head the mean absolute difference of what a head would read."""
    images: int
    pairs: tuple[PairReport, ...]
    untrained: bool
    """Whether all its up factors (B) are zero, as before the first step: it can't do anything."""

    @property
    def doubt(self) -> str:
        """Where the bank changes nothing, for people; empty where it helps at every pair."""
        advice = "Train it for more `epochs`, or with a higher `lr`."
        if self.untrained:
            return f"The bank changes nothing: its up factors (B) are all still zero. {advice}"
        useless = ", ".join(pair.label for pair in self.pairs if not pair.helped)
        what = "divergence" if self.measure == "kl" else "distance"
        told = f"The bank lowers the {what} by no more than 1 % at {useless}. {advice}"
        return told if useless else ""

    def to_json(self) -> dict[str, Any]:
        """For ``--json``; accuracies, where there are any, in percent."""
        pairs = [
            {
                "source": pair.source,
                "target": pair.target,
                "distance": {"without": pair.without, "with": pair.compensated},
                "accuracy": pair.scores
                and {
                    name: score.accuracy
                    for name, score in zip(("teacher", "without", "with"), pair.scores, strict=True)
                },
            }
            for pair in self.pairs
        ]
        return {
            "images": self.images, "measure": self.measure, "untrained": self.untrained,
            "pairs": pairs,
        }  # fmt: skip


def list_pairs(source: int) -> tuple[tuple[int, int], ...]:
    """What a bank is measured at that is for a model trained at one degree."""
    return tuple((source, target) for target in (0, 8, 16) if target != source)


def explain_labels(model: Model, data: Batches, name: str) -> str:
    """Why labels are not those of a model's head, which accuracy needs; empty where they are.

    Args:
        name: what to call the data.
    """
    if not model.spec.classes:
        return ""  # nothing asks for labels
    if data.classes == UNLABELLED:
        return f"{name} has no labels."
    checkpoint = model.checkpoint
    try:
        check_classes(data.classes, name, model.spec, checkpoint.info.classes, checkpoint.file)
    except DataError as error:
        return str(error)
    return ""


class _Latest:
    """A run, and what it said of the latest batch."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, images: Any) -> Any:
        self.logits = torch.from_numpy(self._run(images))
        return self.logits.numpy()


def report_bank(
    model: CompressedVit,
    bank: TrainableBank,
    batches: Batches,
    degrees: Sequence[tuple[int, int]] = PAIRS,
    *,
    labelled: bool = True,
    progress: Progress = lambda title, steps: nullcontext(lambda step: None),
) -> BankReport:
    """Measure a bank with the scale that it was trained with.

    Args:
        degrees: pairs of source and target.
        model: what it was trained on, on the same device; left in evaluation mode, as the bank.
        labelled: whether the labels are those of the model's head, so that accuracy is told.
        progress: opens a bar with a title and a number of steps; called for each step.
    """
    measure: Loss = "kl" if model.spec.classes else "features"
    bank.eval()
    with torch.no_grad():
        sides = {pair: bank.side(*pair) for pair in degrees}
    each = sorted({degree for pair in degrees for degree in pair})
    plain = {degree: _Latest(make_runner(model, degree)) for degree in each}
    students = {
        pair: (plain[pair[1]], _Latest(make_runner(model, pair[1], side)))
        for pair, side in sides.items()
    }
    sums = {pair: [0.0, 0.0] for pair in degrees}
    seen = 0

    def add(images: int) -> None:
        nonlocal seen
        for pair, both in students.items():
            teacher = plain[pair[0]].logits
            for index, student in enumerate(both):
                distance = measure_distance(student.logits, teacher, measure)
                sums[pair][index] += images * distance.item()
        seen += images
        advance("")

    runs = [*plain.values(), *(compensated for _, compensated in students.values())]
    with progress("measuring", len(batches)) as advance:
        scores = dict(zip(runs, measure_accuracy(runs, batches, add), strict=True))
    told = labelled and measure == "kl"
    pairs = (
        PairReport(
            *pair,
            without=sums[pair][0] / seen,
            compensated=sums[pair][1] / seen,
            scores=(scores[plain[pair[0]]], scores[both[0]], scores[both[1]]) if told else None,
        )
        for pair, both in students.items()
    )
    return BankReport(measure, seen, tuple(pairs), untrained=not bank.up.any())

"""Measuring the accuracy of several subjects over their variants."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..variant import Variant
from .accuracy import Run, Score, measure_accuracy
from .divergence import find_distance, find_divergence
from .neighbours import Neighbours, measure_neighbours
from .subject import Batches, Subject, check_subjects

if TYPE_CHECKING:
    from ..export_checks import Progress

SCALES = (0.01, 0.02, 0.05, 0.08, 0.1, 0.12, 0.15)
"""What the paper chooses the scale from (section 5.1)."""
DEFAULT_SCALE = 0.1
_Pair = tuple[Subject, Variant]


@dataclass(frozen=True)
class Measured:
    """One variant of a subject."""

    subject: Subject
    variant: Variant
    """With the scale that was chosen for it."""
    plain: Score
    """With token reduction alone."""
    compensated: Score | None
    """None where there is nothing to add: no bank, or the source degree."""
    oracle: Score | None
    """PyTorch, beside an engine."""
    unlabelled: tuple[float, Score] | None = None
    """The scale that would have been chosen without labels, by the divergence from the model as it
    was trained, and what it gives; None where none was chosen."""

    @property
    def served(self) -> Score:
        """The variant as it is deployed."""
        return self.compensated or self.plain


def measure(
    subjects: Sequence[Subject],
    data: Batches,
    held_out: Batches | None = None,
    scale: float | None = None,
    check: bool = False,
    progress: Progress = lambda title, steps: nullcontext(lambda step: None),
    neighbours: Neighbours | None = None,
) -> list[Measured]:
    """Run every variant of every subject on the same images, loading these once.

    Args:
        data: the test images.
        held_out: choose each variant's scale by the accuracy on these, among :data:`SCALES`.
        scale: of all variants; default: each one's own.
        check: also run PyTorch beside engines.
        neighbours: what the subjects' runs give is embeddings, on which these vote; else logits.

    Raises:
        InputError: the subjects take different images; a scale is asked for where it is baked
            in, or in both ways.
        DataError: the images have other classes than a subject, or than those that vote.
    """
    if held_out is not None and scale is not None:
        raise InputError("`scale` is chosen on the images of `held_out`; give one of the two.")
    scaled = held_out is not None or scale is not None
    other = held_out.name if held_out else None
    check_subjects(subjects, data.name, other, scaled=scaled, heads=neighbours is None)
    for option, images in {"data": data, "held_out": held_out}.items():
        if images is not None and neighbours:
            neighbours.check(images, option)
        elif images is not None:
            for subject in subjects:
                subject.check_classes(images.classes, f"`{option}` {images.name}")

    pairs = [(subject, variant) for subject in subjects for variant in subject.variants]
    others: list[float | None] = [None] * len(pairs)
    if held_out is not None:
        pairs, others = _choose_scales(pairs, held_out, progress, neighbours)
    elif scale is not None:
        pairs = [(subject, replace(variant, scale=scale)) for subject, variant in pairs]
    opened = [
        (
            subject.runner(replace(variant, compensated=False)),
            subject.runner(variant) if variant.baked else None,
            subject.oracle.runner(variant) if check and subject.oracle else None,
            subject.runner(replace(variant, scale=other)) if other is not None else None,
        )
        for (subject, variant), other in zip(pairs, others, strict=True)
    ]
    runs = [run for each in opened for run in each if run]
    scores = iter(_score("evaluating", runs, data, progress, neighbours))
    return [
        Measured(
            *pair,
            plain=next(scores),
            compensated=next(scores) if compensated else None,
            oracle=next(scores) if oracle else None,
            unlabelled=(other, next(scores)) if other is not None else None,
        )
        for pair, (_, compensated, oracle, _), other in zip(pairs, opened, others, strict=True)
    ]


def _score(
    title: str,
    runs: Sequence[Run],
    data: Batches,
    progress: Progress,
    neighbours: Neighbours | None,
) -> list[Score]:
    steps = len(data) + (len(neighbours.images) if neighbours else 0)
    with progress(title, steps) as advance:
        if neighbours:
            return measure_neighbours(runs, data, neighbours, lambda _: advance(""))
        return measure_accuracy(runs, data, lambda _: advance(""))


class _Watched:
    """A run whose outputs are held against those that another one gave on the same images."""

    def __init__(self, run: Run, teacher: _Watched | None = None, classes: bool = True) -> None:
        self._run, self._teacher = run, teacher
        self._measure = find_divergence if classes else find_distance
        self.outputs: Any = None
        self.distances: list[float] = []

    def __call__(self, images: Any) -> Any:
        self.outputs = self._run(images)
        if self._teacher is not None:
            self.distances += self._measure(self.outputs, self._teacher.outputs).tolist()
        return self.outputs


def _choose_scales(
    pairs: Sequence[_Pair],
    held_out: Batches,
    progress: Progress,
    neighbours: Neighbours | None,
) -> tuple[list[_Pair], list[float | None]]:
    """Each variant with the scale that does best on the held-out images.

    Of several as good as each other, the one nearest to the scale of training. And for each the
    one that diverges least from the model as it was trained; None where there is nothing to scale.
    """
    runs: list[Run] = []
    watched: list[dict[float, _Watched]] = []
    for subject, variant in pairs:
        source = Variant.of(
            subject.spec,
            variant.source,
            source=variant.source,
            compensated=False,
            merge=variant.merge,
        )
        teacher = _Watched(subject.runner(source))
        students = {
            scale: _Watched(
                subject.runner(replace(variant, scale=scale)), teacher, classes=neighbours is None
            )
            for scale in SCALES
            if variant.baked
        }
        runs += [teacher, *students.values()] if students else []
        watched.append(students)
    title = "choosing scales"
    scores = dict(
        zip(runs, _score(title, runs, held_out, progress, neighbours) if runs else (), strict=True)
    )
    chosen: list[_Pair] = []
    others: list[float | None] = []
    for (subject, variant), students in zip(pairs, watched, strict=True):
        other = None
        if students:
            rated = [
                (scores[run].accuracy, -abs(scale - DEFAULT_SCALE), scale)
                for scale, run in students.items()
            ]
            variant = replace(variant, scale=max(rated)[-1])
            other = min(students, key=lambda scale: np.mean(students[scale].distances))
        chosen.append((subject, variant))
        others.append(other)
    return chosen, others

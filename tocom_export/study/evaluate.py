"""Measuring the accuracy of several subjects on one data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from .accuracy import RunOf, Score, score
from .results import Results, Row

if TYPE_CHECKING:
    from tocom_export.cli.output import Output
    from tocom_export.cli.subjects import Subject
    from tocom_export.training.data.evaluation import EvalData

SCALES = (0.01, 0.02, 0.05, 0.08, 0.1, 0.12, 0.15)
"""What the paper chooses the scale from (section 5.1)."""
DEFAULT_SCALE = 0.1
ALLOWED_DIFFERENCE = 0.1
"""Points of accuracy between an engine and PyTorch."""


@dataclass(frozen=True)
class Images:
    """Where the images are, as the options say."""

    data: str
    held_out: str | None
    root: Path | None
    download: bool
    batch: int
    workers: int

    def open(
        self, option: Literal["--data", "--held-out"], subjects: Sequence[Subject], output: Output
    ) -> EvalData:
        """The images that an option names, prepared for subjects that take the same."""
        from tocom_export.training.data.evaluation import EvalData
        from tocom_export.training.data.opening import open_images

        which = self.data if option == "--data" else self.held_out
        assert which is not None
        source = open_images(which, root=self.root, split="test", download=self.download)
        for subject in subjects:
            subject.check_classes(source.classes, f"{option} {which}")
        first = subjects[0]
        return EvalData(source, first.spec, first.preprocess, self.batch, self.workers, output.note)


@dataclass(frozen=True)
class Measured:
    """One subject at one target degree."""

    subject: Subject
    target: int
    plain: Score
    compensated: Score | None
    scale: float | None
    reference: Score | None
    """PyTorch, beside an engine."""

    @property
    def engine(self) -> Score:
        """What a bundle serves."""
        return self.compensated or self.plain

    @property
    def difference(self) -> float | None:
        """Points of accuracy that an engine has over PyTorch."""
        return self.engine.accuracy - self.reference.accuracy if self.reference else None

    @property
    def passed(self) -> bool:
        """Whether the engine says what PyTorch says; so it is where that wasn't run."""
        if self.difference is None:
            return True
        # Rounded: 80.3 - 80.2 is a tenth of a point.
        return not self.engine.unusable and round(abs(self.difference), 9) <= ALLOWED_DIFFERENCE

    def check_json(self) -> dict[str, Any]:
        """The comparison with PyTorch."""
        assert self.reference is not None
        return {
            "bundle": str(self.subject.path),
            "target": self.target,
            "images": self.engine.total,
            "engine": self.engine.accuracy,
            "pytorch": self.reference.accuracy,
            "difference": self.difference,
            "images_that_differ": self.engine.differing(self.reference),
            "passed": self.passed,
        }


def measure(
    subjects: Sequence[Subject],
    images: Images,
    scale: float | str | None,
    check: bool,
    output: Output,
) -> list[Measured]:
    """Run every subject at its targets on the test images, loading these once.

    Args:
        scale: of the bank; ``auto`` chooses it on the held-out images, None is 0.1.
        check: also run PyTorch beside the engines of bundles.

    Raises:
        InputError: the subjects take different images; a scale for a bundle.
    """
    first = subjects[0]
    for subject in subjects:
        same = (subject.spec.image_size, subject.preprocess, subject.spec.classes)
        if same != (first.spec.image_size, first.preprocess, first.spec.classes):
            raise InputError(
                f"{subject.path} and {first.path} differ in image size, image statistics or "
                "classes; evaluate them one at a time."
            )
        if subject.baked_scale is not None and scale is not None:
            raise InputError(f"--scale: the engines of {subject.path} have theirs baked in.")
    if images.held_out and _same_place(images.held_out, images.data):
        raise InputError(
            "--held-out is the same as --data: the scale would be chosen on the images that it is "
            "judged by. Name others, such as some of the training split."
        )
    data = images.open("--data", subjects, output)
    scales = _choose(subjects, images, output) if scale == "auto" else None
    fixed = DEFAULT_SCALE if scale is None or scale == "auto" else float(scale)
    runs: list[RunOf] = []

    def add(run: RunOf) -> int:
        runs.append(run)
        return len(runs) - 1

    planned: list[tuple[Subject, int, float, int, int | None, int | None]] = []
    for index, subject in enumerate(subjects):
        for target in subject.targets:
            chosen = scales[index, target] if scales else fixed
            if subject.baked_scale is not None:
                chosen = subject.baked_scale
            plain = add(subject.plain(target))
            compensated, torch = None, None
            if subject.compensated and _gap(subject, target):
                compensated = add(subject.compensated(target, chosen))
            if check and subject.reference:
                torch = add(subject.reference(target))
            planned.append((subject, target, chosen, plain, compensated, torch))
    with output.progress("evaluating", len(data)) as advance:
        scores = _score(runs, data, images.batch, advance)
    return [
        Measured(
            subject,
            target,
            plain=scores[plain],
            compensated=None if compensated is None else scores[compensated],
            scale=None if compensated is None else chosen,
            reference=None if torch is None else scores[torch],
        )
        for subject, target, chosen, plain, compensated, torch in planned
    ]


def _same_place(one: str, other: str) -> bool:
    return one == other or Path(one).resolve() == Path(other).resolve()


def _score(
    runs: Sequence[RunOf], data: EvalData, batch: int, advance: Callable[[str], None]
) -> list[Score]:
    from tocom_export.training.loop.out_of_memory import explained

    with explained(f"--batch {batch}", "lower it, or evaluate fewer models at a time"):
        return score(runs, data, lambda count: advance(""))


def _gap(subject: Subject, target: int) -> bool:
    """Whether there is a compensated model to run; none at the source degree."""
    return subject.compensated is not None and target != subject.source


def _choose(
    subjects: Sequence[Subject], images: Images, output: Output
) -> dict[tuple[int, int], float]:
    """The scale that does best on the held-out images, for each subject and target.

    Of several as good as each other, the one nearest to the scale of training.
    """
    settings = [
        (index, target, scale)
        for index, subject in enumerate(subjects)
        for target in subject.targets
        if _gap(subject, target)
        for scale in SCALES
    ]
    runs = []
    for index, target, scale in settings:
        compensated = subjects[index].compensated
        assert compensated is not None
        runs.append(compensated(target, scale))
    data = images.open("--held-out", subjects, output)
    with output.progress("choosing scales", len(data)) as advance:
        scores = _score(runs, data, images.batch, advance)
    best: dict[tuple[int, int], tuple[float, float, float]] = {}
    for (index, target, scale), result in zip(settings, scores, strict=True):
        rated = (result.accuracy, -abs(scale - DEFAULT_SCALE), scale)
        best[index, target] = max(rated, best.get((index, target), rated))
    chosen = {key: scale for key, (_, _, scale) in best.items()}
    everywhere = ((i, t) for i, subject in enumerate(subjects) for t in subject.targets)
    return {key: chosen.get(key, DEFAULT_SCALE) for key in everywhere}


def rows_of(measured: Sequence[Measured], dataset: str, variant: str, seed: int) -> list[Row]:
    """As rows of a study, those of models trained at a target degree in place."""
    rows = [
        Row(
            dataset=dataset,
            method=m.subject.method.name,
            source=m.subject.source,
            target=m.target,
            baseline=m.plain.accuracy,
            tocom=_tocom(m),
            reference=None,
            seed=seed,
            scale=m.scale,
            variant=variant,
            images=m.plain.total,
            throughput=m.plain.throughput,  # compensation is baked into the weights and costs none
            model=m.subject.path.name,
        )
        for m in measured
    ]
    return list(Results(tuple(rows)).with_references().rows)


def check_rows(
    subjects: Sequence[Subject], dataset: str, variant: str, seed: int, known: Sequence[Row]
) -> None:
    """Raise InputError where two models would have the same rows, before anything is measured.

    Args:
        known: rows that the new ones are added to; those of the same model are replaced.
    """
    before = {
        (row.dataset, row.method, row.variant, row.source, row.seed): row.model
        for row in known
        if row.model
    }
    here: dict[Any, Path] = {}
    for subject in subjects:
        path = subject.path
        key = (dataset, subject.method.name, variant, subject.source, seed)
        beside, other = here.setdefault(key, path), before.get(key, path.name)
        if beside != path or other != path.name:
            raise InputError(
                f"{path} and {other if beside == path else beside} are both of source "
                f"{subject.source} and seed {seed} on {dataset}, and would share their rows; "
                "tell them apart by --variant, --seed or --name, in a run for each."
            )


def _tocom(measured: Measured) -> float | None:
    """With the bank; at its source degree a model is what it is without."""
    if measured.compensated:
        return measured.compensated.accuracy
    has_bank = measured.subject.compensated is not None
    return measured.plain.accuracy if has_bank else None

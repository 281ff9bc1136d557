"""Engines run on labelled images, beside the model that they are of, and judged by that."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.graph.precision import Precision
from tocom_export.model.outputs import OutputName
from tocom_export.study.accuracy import Difference, Run, Score, measure_accuracy
from tocom_export.study.evaluate import Measured
from tocom_export.study.subject import Batches, Oracle, check_classes

from .engine import Backend, Engine, Images, Logits
from .opening import open_engine
from .verify import find_precision

if TYPE_CHECKING:
    from tocom_export.export_checks import Progress

ALLOWED_LOSS = 0.3
"""Points of accuracy that an engine may be shown to lose against the model."""
ALLOWED_DIFFERENCE = 0.1
"""Points between an fp32 engine and the model, where its logits are not judged beside them."""


@dataclass(frozen=True)
class AccuracyCheck:
    """How right an engine is beside the model, on the same labelled images."""

    variant: str
    precision: Precision
    backend: str
    engine: Score
    pytorch: Score
    stored_as: Precision
    """What the model's weights were rounded to."""
    alone: bool = False
    """Whether nothing else is judged beside the accuracy; in fp32 that must be the model's."""

    @property
    def difference(self) -> Difference:
        """Accuracy of the engine less the model's."""
        return self.engine.compare(self.pytorch)

    @property
    def agreement(self) -> float:
        """Share of images with the model's top-1 class, percent."""
        differ = self.engine.count_differences(self.pytorch)
        return 100 * (self.engine.total - differ) / self.engine.total

    @property
    def failure(self) -> str:
        """What is wrong with the engine; empty where it passed.

        A precision costs what it costs: an engine fails where more than :data:`ALLOWED_LOSS` is
        lost beyond doubt, by the whole of the difference's interval.
        """
        if self.engine.unusable:
            return f"NaN or Inf on {self.engine.unusable} of {self.engine.total} images"
        points, (_, high) = self.difference.points, self.difference.interval
        # Rounded: 80.3 - 80.2 is a tenth of a point.
        if self.alone and self.precision == "fp32" and round(abs(points), 9) > ALLOWED_DIFFERENCE:
            return f"accuracy is {points:+.2f} points off PyTorch's, ±{ALLOWED_DIFFERENCE} allowed"
        if high < -ALLOWED_LOSS:
            return f"accuracy is {-high:.2f} points or more below PyTorch's, {ALLOWED_LOSS} allowed"
        return ""

    @property
    def passed(self) -> bool:
        """Whether nothing is shown to be wrong."""
        return not self.failure

    @property
    def doubtful(self) -> bool:
        """Whether it passed and yet may lose more than is allowed: more images would tell.

        Not in fp32, where rounding is no reason to lose any.
        """
        low = self.difference.interval[0]
        return self.passed and self.precision != "fp32" and low < -ALLOWED_LOSS

    def to_json(self) -> dict[str, Any]:
        """One row: accuracies and differences in percent."""
        low, high = self.engine.interval
        least, most = self.difference.interval
        return {
            "variant": self.variant,
            "precision": self.precision,
            "backend": self.backend,
            "accuracy": self.engine.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "images": self.engine.total,
            "pytorch": self.pytorch.accuracy,
            "pytorch_weights": self.stored_as,
            "difference": self.difference.points,
            "difference_low": least,
            "difference_high": most,
            "agreement": self.agreement,
            "finite": not self.engine.unusable,
            "passed": self.passed,
        }


def check_accuracy(found: Measured) -> AccuracyCheck:
    """What a study measured of an engine beside its oracle, to be judged by that alone."""
    of, variant, oracle = found.subject, found.variant, found.oracle
    assert of.oracle is not None and oracle is not None
    return AccuracyCheck(
        variant.name, of.precision, of.backend, found.served, oracle, of.oracle.stored_as(variant),
        alone=True,
    )  # fmt: skip


def verify_accuracy(
    bundle: Bundle,
    data: Batches,
    oracle: Oracle,
    engines: Iterable[tuple[str, Backend]],
    *,
    progress: Progress = lambda title, steps: nullcontext(lambda step: None),
    **options: Any,
) -> list[AccuracyCheck]:
    """The accuracy of a bundle's engines on labelled images, beside the model's.

    Args:
        engines: variants by name or bare degree, each on a backend.
        options: of :func:`~tocom_export.engines.opening.open_engine`.

    Raises:
        DataError: the images have other classes than the bundle.
        InputError: the bundle gives no logits.
        TocomError: what opening an engine raises.
    """
    bundle.find_output("logits")
    names = f"`data` {data.name}"
    check_classes(data.classes, names, bundle.spec, bundle.classes, bundle.path)
    chosen = [(bundle.variant(name), backend) for name, backend in engines]
    opened = [open_engine(bundle, v, backend=b, **options) for v, b in chosen]
    runs = [run_in_parts(engine, "logits") for engine in opened]
    models = {variant.name: oracle.runner(variant) for variant, _ in chosen}
    with progress("measuring accuracy", len(data)) as advance:
        scores = measure_accuracy([*runs, *models.values()], data, lambda _: advance(""))
    known = dict(zip(models, scores[len(runs) :], strict=True))
    precisions = [find_precision(engine, bundle.precision) for engine in opened]
    return [
        AccuracyCheck(v.name, precision, b, score, known[v.name], oracle.stored_as(v))
        for (v, b), precision, score in zip(chosen, precisions, scores[: len(runs)], strict=True)
    ]


def run_in_parts(engine: Engine, output: OutputName) -> Run:
    """An engine's run of any number of images, in batches that it takes; one of its outputs."""

    def run(images: Images) -> Logits:
        most = engine.largest or len(images)
        parts = [images[i : i + most] for i in range(0, len(images), most)]
        return np.concatenate([engine.run_all(part)[output] for part in parts])

    return run

"""Top-1 accuracy of several models on the same images: how sure it is, and the time each takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Run = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
"""Normalised images (B, C, H, W) → logits (B, classes)."""
Interval = tuple[float, float]
"""Between these two lies, with 95 % confidence, what all images of the kind would give."""
_SPREAD = 1.959963984540054
"""Standard deviations on either side of a normal distribution's mean that hold 95 % of it."""


@dataclass
class Score:
    """What one model said of the images so far."""

    predicted: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Top-1 class of each image, batch by batch; -1 where a logit is no number."""
    hits: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    """Whether that is the image's own class."""
    seconds: list[float] = field(default_factory=list)
    """Per image, one value for each batch of full size."""

    def add(self, predicted: npt.NDArray[np.int64], wanted: npt.NDArray[Any]) -> None:
        """What it said of one more batch (B,), and what that shows."""
        self.predicted.append(predicted)
        self.hits.append(predicted == wanted)

    @property
    def total(self) -> int:
        """Images."""
        return sum(map(len, self.predicted))

    @property
    def right(self) -> int:
        """Images whose class it names."""
        return sum(int(batch.sum()) for batch in self.hits)

    @property
    def unusable(self) -> int:
        """Images with a logit that is no number; they count as wrong."""
        return sum(int((batch < 0).sum()) for batch in self.predicted)

    @property
    def accuracy(self) -> float:
        """Percent of the images."""
        return 100 * self.right / self.total

    @property
    def interval(self) -> Interval:
        """Of the accuracy; see :func:`find_interval`."""
        return find_interval(self.accuracy, self.total)

    @property
    def throughput(self) -> float:
        """Images a second: median over the batches."""
        return 1 / statistics.median(self.seconds)

    def compare(self, other: Score) -> Difference:
        """This accuracy less another model's, on the same images in the same batches."""
        pairs = list(zip(self.hits, other.hits, strict=True))
        gained = sum(int((ours & ~theirs).sum()) for ours, theirs in pairs)
        lost = sum(int((theirs & ~ours).sum()) for ours, theirs in pairs)
        return Difference(gained, lost, self.total)

    def count_differences(self, other: Score) -> int:
        """Images on which two models disagree."""
        pairs = zip(self.predicted, other.predicted, strict=True)
        return sum(int((ours != theirs).sum()) for ours, theirs in pairs)


@dataclass(frozen=True)
class Difference:
    """One model's accuracy less another's on the same images.

    Paired: images that both get right, or both wrong, say nothing about which is better, so that
    a difference is known far better than either accuracy.
    """

    gained: int
    """Images right in the first and wrong in the second."""
    lost: int
    """Images wrong in the first and right in the second."""
    images: int

    @property
    def points(self) -> float:
        """Of accuracy, in percent; below 0 where the first is worse."""
        return 100 * (self.gained - self.lost) / self.images

    @property
    def interval(self) -> Interval:
        """Of the points; half an image is added to each of the four cells (Agresti and Min, 2005).

        Without that, models that agree on a few images would be known to agree on all.
        """
        gained, lost, images = self.gained + 0.5, self.lost + 0.5, self.images + 2
        centre = (gained - lost) / images
        half = _SPREAD * math.sqrt(gained + lost - (gained - lost) ** 2 / images) / images
        return _to_percent(max(centre - half, -1.0)), _to_percent(min(centre + half, 1.0))


def find_interval(accuracy: float, images: int) -> Interval:
    """The 95 % interval of an accuracy in percent, by Wilson's score.

    It stays within 0 and 100, and says something there, too, and of a single image.
    """
    share, weight = accuracy / 100, _SPREAD**2 / images
    centre = (share + weight / 2) / (1 + weight)
    half = _SPREAD * math.sqrt((share * (1 - share) + weight / 4) / images) / (1 + weight)
    return _to_percent(max(centre - half, 0.0)), _to_percent(min(centre + half, 1.0))


def find_reach(accuracy: float, images: int) -> float:
    """Points to the farther end of the interval: what stands after ``±``."""
    low, high = find_interval(accuracy, images)
    return max(high - accuracy, accuracy - low)


def format_accuracy(accuracy: float | None, images: int | None) -> str:
    """``30.48 ± 0.91 %``; ``-`` where there is none."""
    if accuracy is None:
        return "-"
    reach = "" if images is None else f" ± {find_reach(accuracy, images):.2f}"
    return f"{accuracy:.2f}{reach} %"


def _to_percent(share: float) -> float:
    return round(100 * share, 9)  # 100, where rounding would leave a little less


def measure_accuracy(
    runs: Sequence[Run],
    batches: Iterable[tuple[Any, Any]],
    advance: Callable[[int], None] = lambda images: None,
) -> list[Score]:
    """Run every model on every batch, in turn, so that a drifting machine is fair to all.

    Args:
        batches: images (B, C, H, W) and labels (B,), as tensors or arrays.
        advance: called with the number of images of each batch that is done.
    """
    scores = [Score() for _ in runs]
    for wanted, outputs in run_in_turns(runs, batches, scores):
        for score, logits in zip(scores, outputs, strict=True):
            usable = np.isfinite(logits).all(axis=1)
            score.add(np.where(usable, logits.argmax(axis=1), -1), wanted)
        advance(len(wanted))
    return scores


def run_in_turns(
    runs: Sequence[Run], batches: Iterable[tuple[Any, Any]], scores: Sequence[Score]
) -> Iterator[tuple[npt.NDArray[Any], list[npt.NDArray[Any]]]]:
    """Labels (B,) of each batch and what every run gives of it; the time goes to its score."""
    full = 0
    for images, labels in batches:
        pixels, wanted = np.asarray(images, np.float32), np.asarray(labels)
        if not len(pixels):
            continue
        full = max(full, len(pixels))
        outputs = []
        for run, score in zip(runs, scores, strict=True):
            began = time.perf_counter()
            outputs.append(np.asarray(run(pixels)))
            taken = time.perf_counter() - began
            if len(pixels) == full:  # a smaller last batch has another cost per image
                score.seconds.append(taken / len(pixels))
        yield wanted, outputs

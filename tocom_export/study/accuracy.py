"""Top-1 accuracy of several models on the same images, and the time each takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Run = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
"""Normalised images (B, C, H, W) → logits (B, classes)."""


@dataclass
class Score:
    """What one model said of the images so far."""

    predicted: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Top-1 class of each image, batch by batch; -1 where a logit is no number."""
    right: int = 0
    seconds: list[float] = field(default_factory=list)
    """Per image, one value for each batch of full size."""

    @property
    def total(self) -> int:
        """Images."""
        return sum(map(len, self.predicted))

    @property
    def unusable(self) -> int:
        """Images with a logit that is no number; they count as wrong."""
        return sum(int((batch < 0).sum()) for batch in self.predicted)

    @property
    def accuracy(self) -> float:
        """Percent of the images."""
        return 100 * self.right / self.total

    @property
    def throughput(self) -> float:
        """Images a second: median over the batches."""
        return 1 / statistics.median(self.seconds)

    def count_differences(self, other: Score) -> int:
        """Images on which two models disagree."""
        pairs = zip(self.predicted, other.predicted, strict=True)
        return sum(int((ours != theirs).sum()) for ours, theirs in pairs)


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
    full = 0
    for images, labels in batches:
        pixels, wanted = np.asarray(images, np.float32), np.asarray(labels)
        if not len(pixels):
            continue
        full = max(full, len(pixels))
        for run, score in zip(runs, scores, strict=True):
            began = time.perf_counter()
            logits = np.asarray(run(pixels))
            taken = time.perf_counter() - began
            if len(pixels) == full:  # a smaller last batch has another cost per image
                score.seconds.append(taken / len(pixels))
            usable = np.isfinite(logits).all(axis=1)
            score.predicted.append(np.where(usable, logits.argmax(axis=1), -1))
            score.right += int((score.predicted[-1] == wanted).sum())
        advance(len(pixels))
    return scores

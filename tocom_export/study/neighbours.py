"""Accuracy of embeddings: each image takes the class that its nearest labelled images vote for.

It needs no head, and is measured as DINO does (Caron et al. 2021, after Wu et al. 2018): the k
training images of the largest cosine similarity vote, each with ``exp(similarity / 0.07)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, InputError
from .accuracy import Run, Score, run_in_turns
from .subject import Batches

NEIGHBOURS = 20
TEMPERATURE = 0.07
_ROWS = 4096
"""Test images at the least whose similarities are in memory at a time."""
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Neighbours:
    """The labelled images that vote, and how many of them do.

    Raises:
        InputError: fewer than one.
    """

    images: Batches
    count: int = NEIGHBOURS

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"`neighbours` {self.count}: there is one at least.")

    def check(self, data: Batches, option: str) -> None:
        """Raise where these can't vote on images that an option names.

        Raises:
            DataError: their classes are others, or they are known to be too few.
            InputError: they are the same images, each of which would be its own neighbour.
        """
        ours, theirs = self.images, f"`{option}` {data.name}"
        if Path(ours.name).resolve() == Path(data.name).resolve():
            raise InputError(f"`knn` is the same as {theirs}; name other images, to learn from.")
        if tuple(ours.classes) != tuple(data.classes):
            raise DataError(
                f"`knn` {ours.name} has {len(ours.classes)} classes and {theirs} has "
                f"{len(data.classes)}, or they are called otherwise; both need the same names in "
                "the same order."
            )
        known = getattr(self.images, "total", None)
        if known is not None:
            self.check_count(known)

    def check_count(self, images: int) -> None:
        """Raise DataError where there are fewer images than are to vote."""
        if images < self.count:
            raise DataError(
                f"`knn` {self.images.name} has {images} images; lower `neighbours`, of which "
                f"{self.count} are to vote."
            )


def measure_neighbours(
    runs: Sequence[Run],
    data: Batches,
    neighbours: Neighbours,
    advance: Callable[[int], None] = lambda images: None,
) -> list[Score]:
    """Embed test and training images by every run, each set read once, and let the latter vote.

    Exact: every similarity is computed. Of the training images only the nearest so far are kept;
    in memory are the embeddings of the test images, of all runs. Times are those of embedding.

    Args:
        runs: images (B, C, H, W) → embeddings (B, F).
        advance: called with the number of images of each batch that is done.

    Raises:
        DataError: there are fewer training images than are to vote, or fewer that any run gives
            numbers of. A run that gives fewer than another leaves each image without a class.
    """
    scores = [Score() for _ in runs]
    labels: list[Array] = []
    nearest = [_Nearest(neighbours.count) for _ in runs]
    for wanted, outputs in run_in_turns(runs, data, scores):
        labels.append(wanted)
        for found, output in zip(nearest, outputs, strict=True):
            found.ask(output)
        advance(len(wanted))
    seen = 0
    for images, known in neighbours.images:
        pixels = np.asarray(images, np.float32)
        if len(pixels):
            for run, found in zip(runs, nearest, strict=True):
                found.look_at(np.asarray(run(pixels)), np.asarray(known))
            seen += len(pixels)
            advance(len(pixels))
    neighbours.check_count(seen)
    if (most := max((found.seen for found in nearest), default=seen)) < neighbours.count:
        raise DataError(
            f"`knn` {neighbours.images.name}: {most} of {seen} embeddings are free of NaN and Inf; "
            f"lower `neighbours`, of which {neighbours.count} are to vote."
        )
    for score, found in zip(scores, nearest, strict=True):
        predicted = found.vote(len(data.classes))
        ends = np.cumsum([len(wanted) for wanted in labels])[:-1]
        for part, wanted in zip(np.split(predicted, ends), labels, strict=True):
            score.add(part, wanted)
    return scores


class _Nearest:
    """The nearest of the training images so far of each test image, by one run's embeddings.

    Test images are joined some thousand at a time, so that no embedding is in memory twice.
    """

    def __init__(self, count: int) -> None:
        self.seen = 0
        """Training images that could be a neighbour."""
        self._count = count
        self._waiting: list[Array] = []
        self._blocks: list[_Block] = []

    def ask(self, embeddings: Array) -> None:
        """Take in a batch of test images (B, F), before any training images."""
        self._waiting.append(_normalise(embeddings))
        if sum(map(len, self._waiting)) >= _ROWS:
            self._join()

    def look_at(self, embeddings: Array, labels: Array) -> None:
        """Take in a batch of training images, (B, F) and (B,)."""
        self._join()
        directions = _normalise(embeddings)
        usable = _find_usable(directions)
        directions, labels = directions[usable], labels[usable]
        self.seen += len(labels)
        for block in self._blocks if len(labels) else ():
            block.look_at(directions, labels)

    def vote(self, classes: int) -> npt.NDArray[np.int64]:
        """The class of each test image (B,); -1 where it, or too few others, have a direction."""
        self._join()
        return np.concatenate([block.vote(classes) for block in self._blocks])

    def _join(self) -> None:
        if self._waiting:
            self._blocks.append(_Block(np.concatenate(self._waiting), self._count))
            self._waiting = []


class _Block:
    """Some test images; of equally near ones those that came first are kept, the nearest first."""

    def __init__(self, directions: Array, count: int) -> None:
        self._usable = _find_usable(directions)
        directions[~self._usable] = 0
        self._directions = directions
        self._similarity = np.full((len(directions), count), -np.inf, np.float32)
        self._labels = np.zeros((len(directions), count), np.int64)

    def look_at(self, directions: Array, labels: Array) -> None:
        """Take in a batch of training images, (B, F) and (B,)."""
        near = self._directions @ directions.T  # (R, B)
        rows = np.flatnonzero(near.max(axis=1) > self._similarity[:, -1])
        near = near[rows]
        both = np.concatenate([self._similarity[rows], near], axis=1)
        theirs = np.broadcast_to(labels, near.shape)
        named = np.concatenate([self._labels[rows], theirs], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, : self._labels.shape[1]]
        self._similarity[rows] = np.take_along_axis(both, order, axis=1)
        self._labels[rows] = np.take_along_axis(named, order, axis=1)

    def vote(self, classes: int) -> npt.NDArray[np.int64]:
        """As :meth:`_Nearest.vote`."""
        # Below 1 at any similarity: what they are multiplied by changes no vote.
        weights = np.exp((self._similarity.astype(np.float64) - 1) / TEMPERATURE)
        votes = np.zeros((len(weights), classes))
        np.add.at(votes, (np.arange(len(weights))[:, None], self._labels), weights)
        enough = self._similarity[:, -1] > -np.inf
        return np.where(self._usable & enough, votes.argmax(axis=1), -1)


def _find_usable(directions: Array) -> npt.NDArray[np.bool_]:
    """Which of (B, F) are directions."""
    return np.asarray(~np.isnan(directions).any(axis=1))


def _normalise(embeddings: Array) -> npt.NDArray[np.float32]:
    """(B, F) float32 of length 1; zeros stay that, and what holds a NaN or an Inf becomes NaN."""
    wide = np.asarray(embeddings, np.float32)
    bad = ~np.asarray(np.isfinite(wide).all(axis=1))
    wide = np.where(bad[:, None], np.float32(0), wide)
    unit: npt.NDArray[np.float32] = wide / np.maximum(
        np.linalg.norm(wide, axis=1, keepdims=True), np.float32(1e-12)
    )
    unit[bad] = np.nan
    return unit

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
"""Test images whose similarities are in memory at a time."""
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
            DataError: their classes are others.
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
        DataError: there are fewer training images than are to vote.
    """
    scores = [Score() for _ in runs]
    labels: list[Array] = []
    embedded: list[list[Array]] = [[] for _ in runs]
    for wanted, outputs in run_in_turns(runs, data, scores):
        labels.append(wanted)
        for kept, output in zip(embedded, outputs, strict=True):
            kept.append(output)
        advance(len(wanted))
    nearest = [_Nearest(np.concatenate(kept), neighbours.count) for kept in embedded]
    seen = 0
    for images, known in neighbours.images:
        pixels = np.asarray(images, np.float32)
        if len(pixels):
            for run, found in zip(runs, nearest, strict=True):
                found.look_at(np.asarray(run(pixels)), np.asarray(known))
            seen += len(pixels)
            advance(len(pixels))
    if seen < neighbours.count:
        raise DataError(
            f"`knn` {neighbours.images.name} has {seen} images; lower `neighbours`, of which "
            f"{neighbours.count} are to vote."
        )
    for score, found in zip(scores, nearest, strict=True):
        predicted = found.vote(len(data.classes))
        ends = np.cumsum([len(wanted) for wanted in labels])[:-1]
        for part, wanted in zip(np.split(predicted, ends), labels, strict=True):
            score.add(part, wanted)
    return scores


class _Nearest:
    """The nearest of the training images so far of each test image, the nearest first.

    Of equally near ones those that came first. An embedding with a NaN is nobody's neighbour.
    """

    def __init__(self, embeddings: Array, count: int) -> None:
        self._usable = _find_usable(embeddings)
        self._directions = _normalise(np.where(self._usable[:, None], embeddings, 0))
        self._similarity = np.full((len(embeddings), count), -np.inf, np.float32)
        self._labels = np.zeros((len(embeddings), count), np.int64)

    def look_at(self, embeddings: Array, labels: Array) -> None:
        """Take in a batch of training images, (B, F) and (B,)."""
        usable = _find_usable(embeddings)
        directions, labels = _normalise(embeddings[usable]), labels[usable]
        if not len(labels):
            return
        count = self._similarity.shape[1]
        for start in range(0, len(self._directions), _ROWS):
            near = self._directions[start : start + _ROWS] @ directions.T  # (R, B)
            last = self._similarity[start : start + _ROWS, -1]
            closer = np.flatnonzero(near.max(axis=1) > last)
            rows, near = start + closer, near[closer]
            both = np.concatenate([self._similarity[rows], near], axis=1)
            theirs = np.broadcast_to(labels, near.shape)
            named = np.concatenate([self._labels[rows], theirs], axis=1)
            order = np.argsort(-both, axis=1, kind="stable")[:, :count]
            self._similarity[rows] = np.take_along_axis(both, order, axis=1)
            self._labels[rows] = np.take_along_axis(named, order, axis=1)

    def vote(self, classes: int) -> npt.NDArray[np.int64]:
        """The class of each test image (B,); -1 where its embedding holds a NaN."""
        found = np.full(len(self._labels), -1, np.int64)
        for start in range(0, len(found), _ROWS):
            rows = slice(start, start + _ROWS)
            # Below 1 at any similarity: what they are multiplied by changes no vote.
            weights = np.exp((self._similarity[rows].astype(np.float64) - 1) / TEMPERATURE)
            votes = np.zeros((len(weights), classes))
            np.add.at(votes, (np.arange(len(weights))[:, None], self._labels[rows]), weights)
            found[rows] = np.where(self._usable[rows], votes.argmax(axis=1), -1)
        return found


def _find_usable(embeddings: Array) -> npt.NDArray[np.bool_]:
    """Which of (B, F) hold numbers alone."""
    return np.asarray(np.isfinite(embeddings).all(axis=1))


def _normalise(embeddings: Array) -> npt.NDArray[np.float32]:
    """(B, F) float32 of length 1; zeros stay that."""
    wide = np.asarray(embeddings, np.float32)
    unit: npt.NDArray[np.float32] = wide / np.maximum(
        np.linalg.norm(wide, axis=1, keepdims=True), np.float32(1e-12)
    )
    return unit

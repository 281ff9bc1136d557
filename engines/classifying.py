"""Image files through an engine, a batch at a time."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import CheckFailed, ImageError
from tocom_export.model.outputs import pluralise
from tocom_export.model.preprocess import find_images

from .engine import Engine, Logits, name_unusable

STDIN = Path("-")
_BATCH = 16


@dataclass(frozen=True)
class Answer:
    """What an engine says of one image."""

    file: str
    outputs: Mapping[str, Logits]
    """By their names, float32: logits (classes,), an embedding (features,)."""

    def rank(self, count: int) -> list[tuple[int, float]]:
        """The likeliest classes, and the probability of each, by softmax."""
        logits = self.outputs["logits"].astype(np.float64)
        weights = np.exp(logits - logits.max())
        shares = weights / weights.sum()
        return [(int(index), float(shares[index])) for index in shares.argsort()[::-1][:count]]


def list_images(paths: Iterable[Path]) -> list[Path]:
    """Image files as they are named, those in a folder by their names; ``-`` is stdin.

    Raises:
        ImageError: a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        found += find_images(path) if path.is_dir() else [path]
    return found


def run_files(bundle: Bundle, engine: Engine, files: Sequence[Path]) -> Iterator[Answer]:
    """An answer for each file, in their order; at no time are more than a batch in memory.

    Raises:
        ImageError: a file is missing or can't be read as an image.
        CheckFailed: an output is NaN or Inf.
    """
    size, load = bundle.spec.image_size, bundle.preprocess.load
    most = min(_BATCH, engine.largest or _BATCH)
    for begin in range(0, len(files), most):
        part = files[begin : begin + most]
        images = np.stack([load(_open(file), size) for file in part])
        found = engine.run_all(images)
        if name := name_unusable(found):
            graph = bundle.graph(engine.variant.name)
            raise CheckFailed(f"{graph}: {pluralise(name)} are NaN or Inf.")
        for number, file in enumerate(part):
            yield Answer(str(file), {name: rows[number] for name, rows in found.items()})


def _open(file: Path) -> Path | BinaryIO:
    if file != STDIN:
        return file
    if sys.stdin is None:
        raise ImageError("stdin is closed.")
    stream = io.BytesIO(sys.stdin.buffer.read())
    stream.name = "stdin"  # for what is said of it
    return stream

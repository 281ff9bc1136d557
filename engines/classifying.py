"""Image files through an engine, a batch at a time."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import CheckFailed, ImageError
from tocom_export.model.outputs import Form, pluralise
from tocom_export.model.preprocess import find_images

from .engine import Engine, Images, Outputs, name_unusable

STDIN = Path("-")
_BATCH = 16


@dataclass(frozen=True)
class Answer:
    """What an engine says of one image."""

    file: str
    outputs: Outputs
    """By their names: logits (classes,), an embedding (channels,), tokens (patches, channels), a
    map (patches,). NaN, or -1, where the image can't be read."""
    error: str = ""
    """Why the image can't be read."""

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

    A file that is missing or can't be read as an image keeps no other from being answered.

    Raises:
        CheckFailed: an output is NaN or Inf.
    """
    most = min(_BATCH, engine.largest or _BATCH)
    for begin in range(0, len(files), most):
        part = files[begin : begin + most]
        images, errors = _load(bundle, part)
        rows = {
            name: np.full((len(part), *form.shape), blank(form), form.dtype)
            for name, form in bundle.forms.items()
        }
        if images:
            found = engine.run_all(np.stack(images))
            if name := name_unusable(found):
                graph = bundle.graph(engine.variant.name)
                raise CheckFailed(f"{graph}: {pluralise(name)} are NaN or Inf.")
            for name, given in found.items():
                rows[name][[not error for error in errors]] = given
        for number, (file, error) in enumerate(zip(part, errors, strict=True)):
            yield Answer(str(file), {name: of[number] for name, of in rows.items()}, error)


def blank(form: Form) -> float:
    """What stands for an output of an image that can't be read: NaN, of whole numbers -1."""
    return np.nan if form.dtype == "float32" else -1


def _load(bundle: Bundle, files: Sequence[Path]) -> tuple[list[Images], list[str]]:
    """The images (channels, H, W) that can be read, and of each file what is wrong with it."""
    images, errors = [], []
    for file in files:
        error = ""
        try:
            images.append(bundle.preprocess.load(_open(file), bundle.spec.image_size))
        except ImageError as fault:
            error = str(fault)
        errors.append(error)
    return images, errors


def _open(file: Path) -> Path | BinaryIO:
    if file != STDIN:
        return file
    if sys.stdin is None:
        raise ImageError("stdin is closed.")
    stream = io.BytesIO(sys.stdin.buffer.read())
    stream.name = "stdin"  # for what is said of it
    return stream

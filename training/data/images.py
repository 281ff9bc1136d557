"""One labelled image after another: what every set of images offers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from PIL import Image

from tocom_export.errors import DataError, ImageError


class UnreadableImage(DataError):
    """One image of a set can't be read; the loader goes on without it, up to a limit."""


class LabelledImages(Protocol):
    """Images that can be read in any order, each with the number of its class.

    Worker processes get a copy, by fork or by pickle, so nothing in it may stay open.
    """

    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    name: str
    """What was opened, for messages."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One upright image (RGB) and its label; raises UnreadableImage where it can't be read."""

    def where(self, index: int) -> str:
        """Name one image, for messages."""


@contextmanager
def name_unreadable(images: LabelledImages, index: int) -> Iterator[None]:
    """Raise UnreadableImage, which names the image, for whatever reading it raises."""
    try:
        yield
    except ImageError as reason:
        raise UnreadableImage(f"{images.where(index)}: {reason}") from None
    except Exception:  # what a broken file makes a reader raise has no common class
        raise UnreadableImage(f"{images.where(index)}: can't be read.") from None

"""Images that can't be read: named, left out, counted, and too many of them refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from tocom_export.errors import DataError

if TYPE_CHECKING:
    from .opening import LabelledImages


class UnreadableImage(DataError):
    """One image of a set can't be read; :class:`Unreadable` decides whether to go on."""


def decode(file: Path | BinaryIO, where: Callable[[], str]) -> Image.Image:
    """One image, in colour.

    Args:
        where: names it; called only if need be, since looking a name up takes a while.

    Raises:
        UnreadableImage: it is missing, or Pillow can't read it.
    """
    try:
        with Image.open(file) as opened:
            image: Image.Image = opened.convert("RGB")
            return image
    except Exception:  # what a broken file makes Pillow's readers raise has no common class
        raise UnreadableImage(f"{where()}: can't be read.") from None


class Unreadable:
    """Counts the images of a set that can't be read; ``indices`` are those met so far.

    Args:
        warn: called once for each of them with a line that names it.
    """

    def __init__(self, images: LabelledImages, warn: Callable[[str], None] | None) -> None:
        self.indices: set[int] = set()
        self._images, self._warn = images, warn
        # One in a hundred; a small set may hold a few more, but something must be left of it.
        self.limit = min(max(10, len(images) // 100), max(len(images) - 1, 0))

    def add(self, indices: Iterable[int]) -> None:
        """Name and count those that are new.

        Raises:
            DataError: there are more of them than ``limit``.
        """
        for index in indices:
            if index in self.indices:
                continue
            self.indices.add(index)
            if self._warn:
                self._warn(f"{self._images.where(index)}: can't be read; skipped")
        if len(self.indices) > self.limit:
            example = self._images.where(min(self.indices))
            raise DataError(
                f"{self._images.name}: too many unreadable images: {len(self.indices)} of "
                f"{len(self._images)}, {example} for one; at most {self.limit} are skipped. "
                "Repair or remove them."
            )

"""Images without labels, wherever they lie in a folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tocom_export.errors import DataError, ImageError
from tocom_export.model.image_files import decode_image
from tocom_export.model.preprocess import find_images

from .images import name_unreadable

UNLABELLED = ("unlabelled",)
"""The one class of images without labels."""


class LooseImages:
    """All image files under a folder, each with the label 0 of the one class that there is.

    Raises:
        DataError: there are none.
    """

    classes: tuple[str, ...] = UNLABELLED

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        try:
            self._files = find_images(folder)
        except ImageError as error:
            raise DataError(str(error)) from None

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One upright image (RGB), and 0."""
        with name_unreadable(self, index):
            return decode_image(self._files[index]), 0

    def where(self, index: int) -> str:
        """An image's path."""
        return str(self._files[index])

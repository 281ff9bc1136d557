"""From image files to the arrays a model takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ImageError, InputError, MissingPackageError
from ..io.json_codec import LATER
from .image_files import SUFFIXES, decode_image

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """The image statistics that a model was trained with; timm's names and meanings."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 1.0
    """Share of the resized shorter side that the centre crop keeps."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_mode: Literal["center", "squash"] = dataclasses.field(default="center", metadata=LATER)
    """``center`` keeps the image's proportions and crops the longer side, ``squash`` makes both
    sides fit."""

    def __post_init__(self) -> None:
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if not (
            len(self.mean) == len(self.std) in (1, 3)
            and finite
            and min(self.std) > 0
            and 0 < self.crop_pct <= 1
            and self.interpolation in ("bilinear", "bicubic")
            and self.crop_mode in ("center", "squash")
        ):
            raise InputError(f"image statistics can't be {dataclasses.asdict(self)}.")

    def load(self, file: Path | str | BinaryIO, size: tuple[int, int]) -> npt.NDArray[np.float32]:
        """One image file, by its path or open, as a normalised array (channels, height, width).

        Resizes the shorter side (both sides for ``squash``) to ``size / crop_pct``, crops the
        centre, normalises; to the pixel what timm's evaluation transform does. Colour, unless
        the statistics are of one channel; upright and of 8 bits, as
        :func:`~tocom_export.model.image_files.convert_image` makes them.

        Raises:
            ImageError: the file is missing, is no image, or has pixels that can't be used.
            MissingPackageError: Pillow is not installed.
        """
        name = file if isinstance(file, (Path, str)) else getattr(file, "name", "an open file")
        try:
            image = decode_image(file, len(self.mean))
        except FileNotFoundError:
            raise ImageError(f"{name}: no such file.") from None
        except IsADirectoryError:
            raise ImageError(f"{name} is a folder; name image files.") from None
        except ImageError as reason:
            raise ImageError(f"{name}: {reason}") from None
        except MissingPackageError:
            raise
        except Exception:  # what a broken file makes Pillow raise has no common class
            raise ImageError(f"{name} is not an image that can be read.") from None
        try:
            return self.apply(image, size)
        except ImageError as reason:
            raise ImageError(f"{name}: {reason}") from None

    def apply(self, image: Image.Image, size: tuple[int, int]) -> npt.NDArray[np.float32]:
        """An image as :func:`~tocom_export.model.image_files.convert_image` makes it, normalised.

        Raises:
            ImageError: it is too thin; the message leaves naming it to the caller.
        """
        from PIL import Image

        height, width = size
        resized = self._resized(image.size, size)
        if resized[0] * resized[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ImageError(f"too thin: its shorter side can't be made {min(size)}.")
        if resized != image.size:
            kind = Image.Resampling[self.interpolation.upper()]
            image = image.resize(resized, kind)
        left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, np.float32).reshape(height, width, -1) / 255
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        normalised: npt.NDArray[np.float32] = ((pixels - mean) / std).transpose(2, 0, 1)
        return np.ascontiguousarray(normalised)

    def _resized(self, image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Width and height after the resize, rounded as timm rounds them."""
        height, width = (math.floor(side / self.crop_pct) for side in size)
        if self.crop_mode == "squash":
            return width, height
        if height == width:
            short, long = sorted(image)
            longer = int(height * long / short)
            return (height, longer) if image[0] <= image[1] else (longer, height)
        ratio = min(image[0] / width, image[1] / height)
        return round(image[0] / ratio), round(image[1] / ratio)

    def load_batch(
        self, files: Iterable[Path | str | BinaryIO], size: tuple[int, int]
    ) -> npt.NDArray[np.float32]:
        """Image files as one batch (B, channels, height, width)."""
        return np.stack([self.load(file, size) for file in files])


def find_images(folder: Path | str) -> list[Path]:
    """All image files under a folder, in the order of their names.

    Raises:
        ImageError: the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder.")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise ImageError(f"{folder}: no image files ({', '.join(SUFFIXES)}) in this folder.")
    return found


def holds_images(folder: Path | str) -> bool:
    """Whether image files lie in a folder itself, rather than in class folders."""
    folder = Path(folder)
    return folder.is_dir() and any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())


def choose_spread(files: Sequence[Path], most: int) -> Sequence[Path]:
    """Every nth file, so that at most so many are left, of all folders and classes."""
    return files[:: -(-len(files) // most)]

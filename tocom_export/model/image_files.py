"""Decoding image files: whatever they hold, as upright images of 8 bits a channel."""

from __future__ import annotations

import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import ImageError, MissingPackageError
from ..io.reading import open_regular

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of the files in a folder, those that are taken for images."""

_PILLOW = re.compile(r"PIL\.")
_ORIENTATION = 274  # tags of EXIF, and of TIFF, whose tags EXIF's are
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2


def decode_image(file: Path | str | BinaryIO, channels: int = 3) -> Image.Image:
    """An image file, by its path or open for reading, as :func:`convert_image` has it.

    Of several frames it is the first. Nothing is printed, whatever Pillow would warn of.

    Raises:
        ImageError: it can be read, but has too many pixels, or none that 8 bits can stand for;
            the message gives the reason and leaves naming the file to the caller.
        MissingPackageError: Pillow is not installed.
        Exception: of any class: the file is missing, damaged or no image.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackageError("pillow", "cpu") from None
    silence_pillow()
    try:
        with _open(file) as stream, Image.open(stream) as opened:
            return convert_image(opened, channels)
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ImageError(f"more than {most} million pixels; make it smaller.") from None


def silence_pillow() -> None:
    """Nothing of many pixels, or of EXIF that is cut short; for good, for threads can't restore it.

    Once: each change of the filters has Python forget which warnings it has shown.
    """
    if ("ignore", None, Warning, _PILLOW, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


def _open(file: Path | str | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """A pipe or a device, which may never end, is not opened."""
    return open_regular(Path(file)) if isinstance(file, (Path, str)) else nullcontext(file)


def convert_image(image: Image.Image, channels: int = 3) -> Image.Image:
    """An image of any mode as RGB, or L for one channel, turned upright as its EXIF data say.

    Whole numbers of more than 8 bits keep the upper 8, as Pillow's 16-bit RGB does; floats from
    0 to 1 become 0 to 255. All else is converted as Pillow does it; alpha is dropped.

    Raises:
        ImageError: floats beyond 0 to 1, or whole numbers of which nobody knows what white is.
    """
    image.load()  # a TIFF file is turned here, and its tag taken away
    orientation = _find_orientation(image)
    if image.mode == "F":
        image = _scale_floats(image)
    elif image.mode.startswith("I"):
        image = _scale_whole_numbers(image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    return _turn(image, orientation)


def _find_orientation(image: Image.Image) -> int:
    """EXIF's number for how the pixels lie, from 1 to 8; 1 where none can be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # what broken EXIF data make Pillow raise has no common class
        return 1
    return found if found in range(1, 9) else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """An upright image; ``ImageOps.exif_transpose`` fails where other tags can't be rewritten."""
    if orientation == 1:
        return image
    from PIL import Image

    turn = Image.Transpose
    upright = image.transpose(
        {
            2: turn.FLIP_LEFT_RIGHT,
            3: turn.ROTATE_180,
            4: turn.FLIP_TOP_BOTTOM,
            5: turn.TRANSPOSE,
            6: turn.ROTATE_270,
            7: turn.TRANSVERSE,
            8: turn.ROTATE_90,
        }[orientation]
    )
    upright.info.clear()  # else whoever reads its EXIF data turns it once more
    return upright


def _scale_floats(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)  # (H, W) float32
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ImageError(
            f"its pixels are floats from {low:g} to {high:g}; scale them to 0 to 1, or save 8 bits."
        )
    return _make_grey(np.rint(pixels * 255), image)


def _scale_whole_numbers(image: Image.Image) -> Image.Image:
    depth = _find_depth(image)
    if depth is None:
        raise ImageError(
            "its pixels are whole numbers, and it isn't known which of them is white; save it "
            "with 8 or 16 bits."
        )
    # Pillow has 32 bits as signed numbers, whose upper 8 bits are those of the unsigned ones.
    return _make_grey(np.asarray(image) >> (depth - 8), image)


def _find_depth(image: Image.Image) -> int | None:
    """Bits of a pixel; None where they aren't known, or are those of a signed number."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
        return None if signed else int(tags[_BITS_PER_SAMPLE][0])
    if image.format == "FITS":  # signed ones, whatever Pillow's mode for them
        return None
    # Pillow scales PGM of any depth to 16 bits, which it keeps in 32.
    return 16 if image.mode.startswith("I;16") or image.format == "PPM" else None


def _make_grey(pixels: npt.NDArray[Any], source: Image.Image) -> Image.Image:
    """Pixels (H, W) of ``source``, scaled to 0 to 255, as mode L."""
    from PIL import Image

    grey = pixels.astype(np.uint8)
    if getattr(source, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey  # Pillow turns it round itself, but only up to 8 bits
    return Image.fromarray(grey)

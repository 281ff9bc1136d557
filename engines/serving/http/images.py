"""Image files in a request: taken apart, held against limits before they are decoded, prepared."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from python_multipart.multipart import MultipartParser, parse_options_header

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import ImageError, MissingPackageError
from tocom_export.model.image_files import convert_image, silence_pillow

from ...engine import Images
from .refusals import Refusal

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Pillow's names of what is decoded; it knows others, some of which start programs."""
MOST_PIXELS = 50_000_000
"""Of an image."""


@dataclass(frozen=True)
class Picture:
    """A file of a request."""

    name: str
    """As the request has it; empty where it has none."""
    content: bytes


def read_pictures(
    body: bytes, content_type: str, most: int, bundle: Bundle
) -> tuple[list[str], Images]:
    """The names of a request's files, and the files as a batch; takes a while, and raises as both.

    Args:
        most: files.
    """
    pictures = split_pictures(body, content_type, most)
    return [picture.name for picture in pictures], prepare_pictures(pictures, bundle)


def split_pictures(body: bytes, content_type: str, most: int) -> list[Picture]:
    """The files of a request: its parts, where it is ``multipart/form-data``, else its body.

    Raises:
        Refusal: the parts are damaged, none or too many.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        pictures = [Picture("", body)] if body else []
    else:
        pictures = _split_parts(body, options.get(b"boundary", b""), most)
    if not pictures:
        raise Refusal(400, "there is no image in the request.")
    return pictures


def _split_parts(body: bytes, boundary: bytes, most: int) -> list[Picture]:
    parts: list[Picture] = []
    field, value, data = bytearray(), bytearray(), bytearray()
    names: list[str] = []
    ended = False

    def begin() -> None:
        if len(parts) == most:
            raise Refusal(400, f"{most} images are taken at most; there are more.")
        data.clear()
        names.clear()

    def end_header() -> None:
        if field.lower() == b"content-disposition":
            _, found = parse_options_header(bytes(value))
            names.append(found.get(b"filename", b"").decode("utf-8", "replace"))
        field.clear()
        value.clear()

    def finish() -> None:
        nonlocal ended
        ended = True

    callbacks: MultipartCallbacks = {
        "on_part_begin": begin,
        "on_header_field": lambda text, start, end: field.extend(text[start:end]),
        "on_header_value": lambda text, start, end: value.extend(text[start:end]),
        "on_header_end": end_header,
        "on_part_data": lambda text, start, end: data.extend(text[start:end]),
        "on_part_end": lambda: parts.append(Picture(names[0] if names else "", bytes(data))),
        "on_end": finish,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        parser.write(body)
        parser.finalize()
    except ValueError as error:  # MultipartParseError is one
        raise Refusal(400, f"the parts of the request are damaged: {error}.") from None
    if not ended:
        raise Refusal(400, "the last part of the request has no end.")
    return parts


def prepare_pictures(pictures: Sequence[Picture], bundle: Bundle) -> Images:
    """Image files as a batch (B, C, H, W) float32, as the model wants them.

    Raises:
        Refusal: one can't be decoded, or has too many pixels.
        MissingPackageError: Pillow is not installed.
    """
    return np.stack([_prepare(picture, bundle) for picture in pictures])


def _prepare(picture: Picture, bundle: Bundle) -> Images:
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackageError("pillow", "serve") from None
    silence_pillow()
    preprocess, size = bundle.preprocess, bundle.spec.image_size
    known, kind = ", ".join(FORMATS), ""
    what = f"{picture.name[:64]!r}" if picture.name else "the image"
    try:
        with Image.open(io.BytesIO(picture.content), formats=FORMATS) as opened:
            kind = opened.format or ""
            if opened.width * opened.height > MOST_PIXELS:
                raise ImageError(f"more than {MOST_PIXELS // 10**6} million pixels.")
            image = convert_image(opened, len(preprocess.mean))
        return preprocess.apply(image, size)
    except ImageError as error:
        raise Refusal(400, f"{what} can't be used: {error}") from None
    except Image.DecompressionBombError:
        raise Refusal(400, f"{what} can't be used: too many pixels.") from None
    except MemoryError:
        raise
    except Exception:  # what a broken file makes Pillow raise has no common class
        if kind:
            raise Refusal(
                400, f"{what} can't be read: a {kind} that is damaged or ends early."
            ) from None
        raise Refusal(400, f"{what} can't be read; {known} are known.") from None

"""What one WebDataset shard holds, and where: its headers are read, its images are not."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

from tocom_export.errors import DataError, brief
from tocom_export.model.image_files import SUFFIXES

IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
LARGEST_IMAGE = 512 * 2**20
"""Bytes; a larger one is no training image, and would be read into memory whole."""
LARGEST_LABEL = 10**6
_LARGEST_LABEL_FILE = 2**20

_KEY = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__(/|$)")  # webdataset's own notes
_MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


Sample = tuple[str, int, int, int, int]
"""An image's key, where its tar header and its bytes begin, how many, and its label."""


def index_shard(shard: Path) -> Iterator[Sample]:
    """The samples of a shard, in order.

    A sample is the members in a row that have the same name up to the first dot after the last
    slash. Names are compared and never used as paths; members other than the image and the
    label (pickles among them) aren't read.

    Raises:
        DataError: the file is no plain, whole tar; or a sample lacks an image or a label.
    """
    try:
        with shard.open("rb") as file:
            yield from _read_samples(file)
    except DataError as error:
        raise DataError(f"{shard}: {error}") from None
    except OSError as error:
        raise DataError(f"{shard}: can't be read ({error.strerror or brief(error)}).") from None
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(f"{shard}: not a whole tar file ({brief(error)}).") from None


def _read_samples(file: BinaryIO) -> Iterator[Sample]:
    if packed := _MAGIC.get(file.read(2)):
        raise DataError(
            f"compressed ({packed}), so images can't be read in any order; unpack it to a plain "
            ".tar."
        )
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for key, group in groupby(_list_members(tar, end), itemgetter(0)):
            yield _read_sample(tar, key, [(kind, member) for _, kind, member in group])
        file.seek(tar.offset)  # tarfile takes a damaged header for the end
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"damaged or cut short at byte {tar.offset}.")


def _list_members(tar: tarfile.TarFile, end: int) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of each member that belongs to a sample."""
    for member in tar:
        if member.size < 0 or member.offset_data + member.size > end:
            raise DataError(f"{member.name} reaches beyond the end of the file.")
        match = _KEY.fullmatch(member.name)
        if match and member.isreg() and not member.issparse() and not _META.match(member.name):
            yield match[1], match[2].lower(), member


def _read_sample(
    tar: tarfile.TarFile, key: str, members: list[tuple[str, tarfile.TarInfo]]
) -> Sample:
    """The image among the members of one sample, and its label."""
    images = [member for kind, member in members if kind in IMAGES]
    if len(images) != 1:
        found = len(images) or "no"
        raise DataError(f"{key} has {found} images ({', '.join(IMAGES)}); a sample has one.")
    (image,) = images
    if image.size > LARGEST_IMAGE:
        raise DataError(f"{image.name} has {image.size} bytes; 512 MiB are the most.")
    label = _read_label(tar, dict(members))
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < LARGEST_LABEL:
        raise DataError(
            f"{key} has no label: a whole number from 0 on, as text in a .cls member or as "
            '"label" in a .json one.'
        )
    return key, image.offset, image.offset_data, image.size, label


def _read_label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> object:
    """What stands in ``.cls``, or under ``label`` or ``cls`` in ``.json``; None for no number."""
    member = members.get("cls") or members.get("json")
    stream = tar.extractfile(member) if member and member.size <= _LARGEST_LABEL_FILE else None
    with suppress(ValueError, RecursionError):
        if stream and "cls" in members:
            return int(stream.read())
        if stream and isinstance(fields := json.loads(stream.read()), dict):
            return fields.get("label", fields.get("cls"))
    return None

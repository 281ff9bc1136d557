"""What one WebDataset shard holds, and where: its headers are read, its images are not."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tocom_export.errors import DataError, brief

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
LARGEST_IMAGE = 512 * 2**20
"""Bytes; a larger one is no training image, and would be read into memory whole."""
LARGEST_LABEL = 10**6
_LARGEST_LABEL_FILE = 2**20

_KEY = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__(/|$)")  # webdataset's own notes
_MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Sample(NamedTuple):
    """One image: where its tar header and its bytes begin, how many, and its label."""

    key: str
    header: int
    offset: int
    size: int
    label: int


def index_shard(shard: Path) -> Iterator[Sample]:
    """The samples of a shard, in order.

    A sample is the members in a row that have the same name up to the first dot after the last
    slash. Names are compared and never used as paths; members other than the image and the
    label (pickles among them) aren't read.

    Raises:
        DataError: the file is no plain, whole tar; or a sample lacks an image or a label.
    """
    size = _checked_size(shard)
    try:
        with tarfile.open(shard, "r:") as tar:
            members = _members(shard, tar, size)
            for key, group in groupby(members, key=lambda found: found[0]):
                yield _sample(shard, tar, key, [(kind, member) for _, kind, member in group])
            # tarfile takes a damaged header for the end.
            assert tar.fileobj
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(f"{shard}: damaged or cut short at byte {tar.offset}.")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{shard}: not a whole tar file ({brief(error)}).") from None


def _checked_size(shard: Path) -> int:
    try:
        with shard.open("rb") as file:
            packed = _MAGIC.get(file.read(2))
            size = file.seek(0, 2)
    except OSError as error:
        raise DataError(f"{shard}: can't be read ({error.strerror}).") from None
    if packed:
        raise DataError(
            f"{shard} is compressed ({packed}), so images can't be read in any order; unpack it "
            "to a plain .tar."
        )
    return size


def _members(
    shard: Path, tar: tarfile.TarFile, end: int
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of each member that belongs to a sample."""
    for member in tar:
        if member.size < 0 or member.offset_data + member.size > end:
            raise DataError(f"{shard}: {member.name} reaches beyond the end of the file.")
        match = _KEY.fullmatch(member.name)
        if match and member.isreg() and not member.issparse() and not _META.match(member.name):
            yield match[1], match[2].lower(), member


def _sample(
    shard: Path, tar: tarfile.TarFile, key: str, members: list[tuple[str, tarfile.TarInfo]]
) -> Sample:
    """The image among the members of one sample, and its label."""
    images = [member for kind, member in members if kind in IMAGES]
    if len(images) != 1:
        raise DataError(
            f"{shard}: {key} has {len(images) or 'no'} images ({', '.join(IMAGES)}); "
            "a sample has one."
        )
    (image,) = images
    if image.size > LARGEST_IMAGE:
        raise DataError(f"{shard}: {image.name} has {image.size} bytes; 512 MiB are the most.")
    label = _label(shard, tar, key, dict(members))
    return Sample(key, image.offset, image.offset_data, image.size, label)


def _label(shard: Path, tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> int:
    """The number in ``.cls``, or under ``label`` or ``cls`` in ``.json``."""
    member = members.get("cls") or members.get("json")
    stream = tar.extractfile(member) if member and member.size <= _LARGEST_LABEL_FILE else None
    label: object = None
    try:
        if stream and "cls" in members:
            label = int(stream.read())
        elif stream:
            fields = json.loads(stream.read())
            label = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    except (ValueError, RecursionError):
        label = None
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < LARGEST_LABEL:
        raise DataError(
            f"{shard}: {key} has no label: a whole number from 0 on, as text in a .cls member "
            'or as "label" in a .json one.'
        )
    return label

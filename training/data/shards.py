"""WebDataset shards, read in any order: plain tar files that are indexed once when opened."""

from __future__ import annotations

import re
import tarfile
from array import array
from collections.abc import Iterator
from glob import glob
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from tocom_export.errors import DataError, brief

from .images import UnreadableImage, decode
from .shard_index import Sample, index_shard

_ARCHIVE = re.compile(r"\.(tar|tgz|tbz2|txz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)


def is_shards(data: str) -> bool:
    """Whether ``data`` means shards: an archive's name, a pattern of them, or their folder."""
    path = Path(data)
    if path.is_dir():
        files = sorted(path.iterdir())
        # A compressed download is often kept beside the class folders that came out of it.
        plain = any(file.suffix.lower() == ".tar" for file in files)
        packed = any(_ARCHIVE.search(file.name) for file in files)
        return plain or (packed and not any(file.is_dir() for file in files))
    return bool(_ARCHIVE.search(data)) or "://" in data or data.startswith("pipe:")


class Shards:
    """Images of WebDataset shards, with labels from their ``.cls`` or ``.json`` members.

    The classes are named by the lines of a ``classes.txt`` beside the shards; without one they
    are the numbers up to the largest label. The index takes 28 bytes an image and no Python
    object, so that a thousand shards of ImageNet fit beside any number of worker processes.

    Args:
        data: a folder, a file, or a pattern with ``{000..146}``, ``*``, ``?`` or ``[...]``.

    Raises:
        DataError: a shard is missing, damaged or compressed, or a sample has no image or label.
    """

    def __init__(self, data: str) -> None:
        self.name = data
        self._shards = [str(shard) for shard in find_shards(data)]
        names = _class_names(Path(self._shards[0]).with_name("classes.txt"))
        shard, header, offset, size, label = (array("q") for _ in range(5))
        for number, path in enumerate(self._shards):
            for sample in index_shard(Path(path)):
                _check_label(path, sample, names)
                shard.append(number)
                header.append(sample.header)
                offset.append(sample.offset)
                size.append(sample.size)
                label.append(sample.label)
        if not label:
            raise DataError(f"{data}: the shards hold no samples.")
        self._shard, self._size = np.array(shard, np.int32), np.array(size, np.int32)
        self._header, self._offset = np.array(header), np.array(offset)
        self._label = np.array(label, np.int32)
        self.classes = names or tuple(map(str, range(int(self._label.max()) + 1)))

    def __len__(self) -> int:
        return len(self._label)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One image (RGB) and its label; opens the shard each time, so that any process can."""
        size = int(self._size[index])
        try:
            with Path(self._shards[self._shard[index]]).open("rb", buffering=0) as file:
                file.seek(int(self._offset[index]))
                raw = file.read(size)
        except OSError:
            raise UnreadableImage(f"{self.where(index)}: can't be read.") from None
        image = decode(BytesIO(raw), lambda: self.where(index))
        return image, int(self._label[index])

    def where(self, index: int) -> str:
        """The shard and the image's name in it."""
        shard = self._shards[self._shard[index]]
        try:
            with Path(shard).open("rb") as file:
                file.seek(int(self._header[index]))
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    first = tar.next()
                    return f"{shard}: {first.name if first else index}"
        except (OSError, tarfile.TarError):  # the shard has gone or was changed since
            return f"{shard}: image {index}"


def find_shards(data: str) -> list[Path]:
    """The shards that ``data`` means, in the order of their names or of the pattern.

    Raises:
        DataError: one is missing, or none is found.
    """
    if "://" in data or data.startswith("pipe:"):
        raise DataError(f"{data}: shards are read from local files; fetch them first.")
    path = Path(data)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if _ARCHIVE.search(file.name))
    if path.is_file():
        return [path]
    found: list[Path] = []
    for pattern in _expand(data):
        matches = sorted(glob(pattern))  # noqa: PTH207 - the pattern may be absolute
        if not matches:
            raise DataError(f"{data}: there is no file {pattern}.")
        found.extend(map(Path, matches))
    return found


def _expand(pattern: str) -> Iterator[str]:
    """``a-{00..02}.tar`` → ``a-00.tar``, ``a-01.tar``, ``a-02.tar``; lazily, however many."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        filled = f"{number:0{len(first)}d}"
        yield from _expand(pattern[: match.start()] + filled + pattern[match.end() :])


def _class_names(file: Path) -> tuple[str, ...]:
    """The lines of ``classes.txt``; none where there is no such file."""
    if not file.exists():
        return ()
    try:
        names = tuple(line.strip() for line in file.read_text("utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: can't be read ({brief(error)}).") from None
    if not names or not all(names):
        raise DataError(f"{file}: empty, or with an empty line; it names a class per line.")
    return names


def _check_label(shard: str, sample: Sample, names: tuple[str, ...]) -> None:
    if names and sample.label >= len(names):
        raise DataError(
            f"{shard}: {sample.key} has label {sample.label}, but classes.txt names "
            f"{len(names)} classes; labels count from 0."
        )

"""WebDataset shards, read in any order: plain tar files that are indexed once when opened."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from glob import glob
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from tocom_export.errors import DataError, brief
from tocom_export.model.image_files import decode_image

from .images import name_unreadable
from .shard_index import index_shard

_ARCHIVE = re.compile(r"\.(tar|tgz|tbz2|txz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
_ENTRY = np.dtype(
    [("shard", "i4"), ("header", "i8"), ("offset", "i8"), ("size", "i4"), ("label", "i4")]
)
"""An image in the index: which shard, where its tar header and its bytes begin, how many."""


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
    """

    def __init__(self, data: str) -> None:
        self.name = data
        self._shards = [str(shard) for shard in find_shards(data)]
        names = _read_class_names(Path(self._shards[0]).with_name("classes.txt"))
        self._index = np.fromiter(_read_entries(self._shards, names), _ENTRY)
        if not len(self._index):
            raise DataError(f"{data}: the shards hold no samples.")
        self.classes = names or tuple(map(str, range(int(self._index["label"].max()) + 1)))

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """One image (RGB) and its label; opens the shard each time, so that any process can."""
        entry = self._index[index]
        with name_unreadable(self, index):
            with Path(self._shards[entry["shard"]]).open("rb", buffering=0) as file:
                file.seek(entry["offset"])
                raw = file.read(entry["size"])
            return decode_image(BytesIO(raw)), int(entry["label"])

    def where(self, index: int) -> str:
        """The shard and the image's name in it."""
        entry = self._index[index]
        shard = self._shards[entry["shard"]]
        try:
            with Path(shard).open("rb") as file:
                file.seek(entry["header"])
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    first = tar.next()
                    return f"{shard}: {first.name if first else index}"
        except (OSError, tarfile.TarError):  # the shard has gone or was changed since
            return f"{shard}: image {index}"


def find_shards(data: str) -> list[Path]:
    """The shards that ``data`` means, in the order of their names or of the pattern."""
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
    before, after = pattern[: match.start()], pattern[match.end() :]
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _expand(f"{before}{number:0{len(match[1])}d}{after}")


def _read_class_names(file: Path) -> tuple[str, ...]:
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


def _read_entries(shards: list[str], names: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
    """The rows of the index; raises DataError for a label that ``names`` don't reach."""
    for number, shard in enumerate(shards):
        for key, *place, label in index_shard(Path(shard)):
            if names and label >= len(names):
                raise DataError(
                    f"{shard}: {key} has label {label}, but classes.txt names {len(names)} "
                    "classes; labels count from 0."
                )
            yield number, *place, label

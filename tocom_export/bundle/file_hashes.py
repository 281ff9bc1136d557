"""What a bundle's manifest says of each file, held against the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy.typing as npt
from msgspec import Meta
from safetensors import SafetensorError

from ..errors import BundleError
from ..io.tensors import read_tensors


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    sha256: str
    bytes: Annotated[int, Meta(ge=0)]


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """SHA-256 and size of files in a folder, hashed side by side."""

    def record(name: str) -> FileRecord:
        digest = hashlib.sha256()
        with (folder / name).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
            return FileRecord(digest.hexdigest(), stream.tell())

    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(record, names), strict=True))


def read_recorded(file: Path, record: FileRecord) -> bytes:
    """A file's content, whatever becomes of the file later.

    Raises:
        BundleError: it is missing, or not the file that the record is of.
    """
    try:
        if file.stat().st_size != record.bytes:
            raise BundleError(f"{file} was changed since its bundle was opened; reload it.")
        content = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: can't be read: {error.strerror}.") from None
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise BundleError(
            f"{file} is not what its bundle's manifest said (SHA-256 differs): it was changed "
            "since; build it again, or, where that was done meanwhile, open it anew."
        )
    return content


def load_recorded(file: Path, record: FileRecord) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a weights file, in memory.

    Raises:
        BundleError: as :func:`read_recorded` says, or it is broken.
    """
    try:
        return read_tensors(read_recorded(file, record))
    except SafetensorError:
        raise BundleError(f"{file} is not a safetensors file.") from None

"""Where each tensor lies in a safetensors file, so that a graph can point at it."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

_MAX_HEADER = 100_000_000  # the format's own limit, bytes
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
"""Bytes of one element, by safetensors dtype; a checkpoint of others is not of a model."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor within a safetensors file."""

    file: Path
    dtype: str
    """As safetensors spells it: F32, F16, BF16, ..."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes."""


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Reads the header alone; sizes are checked against the file's before anything is believed.

    Raises:
        CheckpointError: the file is missing, truncated, or not of this format.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{file} is not a safetensors file, or is truncated.")
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            if any(not isinstance(value, str) for value in metadata.values()):
                raise ValueError
            tensors = {
                name: _entry(file, entry, 8 + length, size) for name, entry in header.items()
            }
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file.") from None
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{file} is not a safetensors file, or is truncated.") from None
    return tensors, metadata


def _entry(file: Path, entry: dict[str, object], start: int, size: int) -> StoredTensor:
    """One entry of the header, checked.

    Raises:
        ValueError, KeyError, TypeError: it is not what the format says.
        CheckpointError: the data lies beyond the end of the file.
    """
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise ValueError
    begin, end = offsets
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError
    if dtype in WIDTHS and end - begin != math.prod(shape) * WIDTHS[dtype]:
        raise ValueError
    if start + end > size:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes of at least {start + end}. Copy it again."
        )
    return StoredTensor(file, dtype, tuple(shape), start + begin, end - begin)

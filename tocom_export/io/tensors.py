"""Safetensors files: where each tensor lies, so that a graph can point at it, and its values."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from safetensors import deserialize

from ..errors import CheckpointError, InputError
from .json_codec import decode, parse_json
from .reading import open_regular

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
"""PyTorch name → weight."""
Bytes = Annotated[int, Meta(ge=0, le=2**48)]

_POINTER = b"version "
"""How Git LFS's stand-in for a file begins; as a length it would be petabytes."""
_MAX_HEADER = 100_000_000  # the format's own limit, bytes
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
"""Bytes of one element, by safetensors dtype; a checkpoint of others is not of a model."""
NUMPY_TYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I8": np.int8,
}
"""What we read of them, as NumPy's types."""


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


@dataclass(frozen=True)
class _Entry:
    """What the header says of one tensor."""

    dtype: str
    shape: Annotated[tuple[Bytes, ...], Meta(max_length=8)]
    data_offsets: tuple[Bytes, Bytes]

    def __post_init__(self) -> None:
        if math.prod(max(side, 1) for side in self.shape) > 2**48:  # an empty one, too
            raise InputError("its shape is too large.")
        if self.length < 0 or (
            self.dtype in WIDTHS and self.length != math.prod(self.shape) * WIDTHS[self.dtype]
        ):
            raise InputError("its shape and its length contradict each other.")

    @property
    def length(self) -> int:
        """Bytes."""
        return self.data_offsets[1] - self.data_offsets[0]


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Reads the header alone; sizes are checked against the file's before anything is believed.

    Raises:
        CheckpointError: the file is missing, truncated, or not of this format.
    """
    try:
        with open_regular(file) as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            prefix = stream.read(8)
            if prefix == _POINTER:
                raise CheckpointError(
                    f"{file} is a Git LFS pointer, in place of the weights; `git lfs pull` in its "
                    "folder fetches them."
                )
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{file} is not a safetensors file, or is truncated.")
            header = decode(dict[str, Any], parse_json(stream.read(length)))
            metadata = decode(dict[str, str], header.pop("__metadata__", {}))
            entries = decode(dict[str, _Entry], header)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file.") from None
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error.strerror}.") from None
    except CheckpointError:
        raise
    except InputError:
        raise CheckpointError(f"{file} is not a safetensors file, or is truncated.") from None
    end = 8 + length + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if end > size:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes of at least {end}. Copy it again."
        )
    tensors = {
        name: StoredTensor(file, e.dtype, e.shape, 8 + length + e.data_offsets[0], e.length)
        for name, e in entries.items()
    }
    return tensors, metadata


def map_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Array]:
    """The tensors of one safetensors file as read-only views of the mapped file."""
    if not stored:
        return {}
    for name, tensor in stored.items():
        if tensor.dtype not in NUMPY_TYPES:
            raise CheckpointError(f"{tensor.file}: {name} is of type {tensor.dtype}.")
    data = np.memmap(next(iter(stored.values())).file, np.uint8, "r")
    return {
        name: data[t.offset : t.offset + t.length].view(NUMPY_TYPES[t.dtype]).reshape(t.shape)
        for name, t in stored.items()
    }


def read_tensors(content: bytes) -> dict[str, Array]:
    """The tensors of a safetensors file that lies in memory.

    Raises:
        SafetensorError: it is broken.
    """
    return {
        name: np.frombuffer(entry["data"], NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in deserialize(content)  # type: ignore[no-untyped-call]
    }


def is_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite.

    A sum is infinite or NaN where an element is, and takes one pass without a temporary;
    only a sum that overflowed by itself needs a look at each element.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(array, dtype=np.float32)):
            return True
    return bool(np.isfinite(array).all())

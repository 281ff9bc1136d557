"""A model's weights: opened, checked against a spec, read tensor by tensor."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import deserialize

from ..errors import CheckpointError, InputError
from ..io.pickles import load_pickle
from ..io.tensors import StoredTensor, read_header
from ..model.spec import VitSpec
from .metadata import ModelInfo

Array = npt.NDArray[Any]
_NUMPY: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I8": np.int8,
}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. A safetensors file is mapped, not read."""

    file: Path
    tensors: Mapping[str, Array]
    """PyTorch name → array of float32, float16, bfloat16 or (.pth) float64; int8 in a bundle's."""
    info: ModelInfo

    @classmethod
    def open(cls, file: Path) -> Checkpoint:
        """Open a .safetensors, .pth, .pt or .bin file (the latter three need torch).

        Raises:
            CheckpointError: the file is missing, truncated or of another format.
            MissingPackageError: torch is needed and not installed.
        """
        if file.suffix in (".pth", ".pt", ".bin"):
            return cls(file, load_pickle(file), ModelInfo())
        stored, metadata = read_header(file)
        for name, tensor in stored.items():
            if tensor.dtype not in _NUMPY:
                raise CheckpointError(
                    f"{file}: {name} is of type {tensor.dtype}; F32, F16 and BF16 are read."
                )
        try:
            info = ModelInfo.from_metadata(metadata)
        except InputError as error:
            raise CheckpointError(f"{file}: {error}") from None
        return cls(file, map_tensors(stored), info)

    def fit(self, spec: VitSpec) -> VitSpec:
        """The spec with this checkpoint's number of classes, once every tensor fits it.

        Raises:
            CheckpointError: tensors are missing, too many, of another shape, or not finite.
        """
        if integers := [name for name, t in self.tensors.items() if t.dtype == np.int8]:
            raise CheckpointError(
                f"{self.file}: {integers[0]} is int8, of a bundle built so; give the checkpoint "
                "that the bundle was built from."
            )
        head = self.tensors.get("head.weight")
        if head is not None and head.ndim == 2:
            spec = dataclasses.replace(spec, classes=head.shape[0])
        elif not any(name.startswith("head") for name in self.tensors):
            spec = dataclasses.replace(spec, classes=0)
        named = self.info.classes
        if named is not None and len(named) != spec.classes:
            raise CheckpointError(
                f"{self.file}: its metadata names {len(named)} classes, but its head has "
                f"{spec.classes}."
            )
        expected = spec.weights()
        if missing := [name for name in expected if name not in self.tensors]:
            near = difflib.get_close_matches(missing[0], self.tensors, 1)
            hint = f"; it has {near[0]}" if near else ""
            raise CheckpointError(
                f"{self.file}: {len(missing)} of {len(expected)} tensors of {spec.model} are "
                f"missing, {missing[0]} first{hint}. Does --model NAME say which model it is?"
            )
        if extra := [name for name in self.tensors if name not in expected]:
            raise CheckpointError(
                f"{self.file}: {spec.model} has no tensor {extra[0]} "
                f"({len(extra)} such tensors). Does --model NAME say which model it is?"
            )
        for name, shape in expected.items():
            found = self.tensors[name]
            if found.shape != shape:
                raise CheckpointError(
                    f"{self.file}: {name} has shape {found.shape}, but {spec.model} needs {shape}."
                )
            if not finite(found):
                raise CheckpointError(f"{self.file}: {name} holds NaN or infinite values.")
        return spec


def map_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Array]:
    """The tensors of one safetensors file as read-only views of the mapped file."""
    if not stored:
        return {}
    data = np.memmap(next(iter(stored.values())).file, np.uint8, "r")
    return {
        name: data[t.offset : t.offset + t.length].view(_NUMPY[t.dtype]).reshape(t.shape)
        for name, t in stored.items()
    }


def read_tensors(content: bytes) -> dict[str, Array]:
    """The tensors of a safetensors file that lies in memory.

    Raises:
        SafetensorError: it is broken.
    """
    return {
        name: np.frombuffer(entry["data"], _NUMPY[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in deserialize(content)  # type: ignore[no-untyped-call]
    }


def finite(array: Array) -> bool:
    """Whether no element is NaN or infinite.

    A sum is infinite or NaN where an element is, and takes one pass without a temporary;
    only a sum that overflowed by itself needs a look at each element.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(array, dtype=np.float32)):
            return True
    return bool(np.isfinite(array).all())

"""The files of a folder of the hub: JSON records, and weights in one file or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointError, InputError
from ...io.json_codec import decode, read_json
from ...io.pickles import clean_names
from ...io.tensors import Array, StoredTensor, map_tensors, read_header
from .names import list_needed

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
"""Weights as they were saved before safetensors; torch is needed to read them."""
_LARGEST = 20_000_000  # bytes; names of 20,000 classes, twice, are one million


def read_record(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is missing, too large, or none.
    """
    try:
        return decode(dict[str, Any], read_json(file, _LARGEST))
    except FileNotFoundError:
        if (file.parent / "manifest.json").exists():
            raise CheckpointError(
                f"{file.parent} looks like a bundle; its weights.safetensors can be a `checkpoint`."
            ) from None
        raise CheckpointError(
            f"{file.parent} has no {file.name}, so it is no folder that transformers or timm "
            "saved; `checkpoint` is such a folder, or a file."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error.strerror}.") from None
    except InputError as error:
        raise CheckpointError(f"{file}: {error}") from None


def find_pickled(folder: Path) -> Path | None:
    """The pickled weights of a folder that has no others."""
    others = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    return folder / PICKLED if not others and (folder / PICKLED).exists() else None


def read_weights(folder: Path, file: Path | None = None) -> dict[str, Array]:
    """The tensors that a model may need, mapped, without prefixes of parallel models.

    Args:
        file: the one to read, unless it is one of several shards; default: what transformers
            and timm would read.

    Raises:
        CheckpointError: a file is missing or broken, or an index leads astray.
    """
    stored = _read_stored(folder, file)
    kept = {name: stored[name] for name in list_needed(stored)}
    names = clean_names(kept, file or folder)
    tensors: dict[str, Array] = {}
    for each in sorted({tensor.file for tensor in kept.values()}):
        tensors |= map_tensors({name: t for name, t in kept.items() if t.file == each})
    return {names[name]: tensor for name, tensor in tensors.items()}


def _read_stored(folder: Path, file: Path | None) -> dict[str, StoredTensor]:
    """Where each tensor lies."""
    shards = _read_index(folder / INDEX) if (folder / INDEX).exists() else {}
    if file is not None and file.name not in shards.values():
        return read_header(file)[0]
    if (folder / WEIGHTS).exists() and file is None:  # as in transformers, before the shards
        return read_header(folder / WEIGHTS)[0]
    if not shards and (folder / f"{PICKLED}.index.json").exists():
        raise CheckpointError(
            f"{folder} has pickled weights in several files, which aren't read; load and save the "
            "model with transformers, which writes safetensors."
        )
    if not shards:
        raise CheckpointError(f"{folder} has no {WEIGHTS}, nor {PICKLED}.")
    return _read_shards(folder, shards)


def _read_shards(folder: Path, shards: dict[str, str]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).exists():
            raise CheckpointError(f"{folder}: {shard}, which {INDEX} names, is missing.")
        held = read_header(folder / shard)[0]
        for name in (name for name, place in shards.items() if place == shard):
            if name not in held:
                raise CheckpointError(f"{folder / shard} lacks {name}, which {INDEX} says it has.")
            stored[name] = held[name]
    return stored


def _read_index(file: Path) -> dict[str, str]:
    """Tensor → name of its shard."""
    try:
        shards = decode(dict[str, str], read_record(file).get("weight_map"))
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{file}: weight_map: {error}") from None
    for shard in shards.values():
        if set(shard) & set("/\\:\0") or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{file}: {shard!r} is no safetensors file in this folder.")
    return shards

"""PyTorch's own checkpoint files (.pth, .pt, .bin, .tar), which need torch to be read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..errors import CheckpointError, MissingPackageError, brief

SUFFIXES = (".pth", ".pt", ".bin", ".tar")  # .tar: model_best.pth.tar
AVERAGED = ("state_dict_ema", "model_ema")
"""Where timm's and DeiT's scripts keep the running average of the weights."""
_PLAIN = ("state_dict", "model", "module")


@dataclass(frozen=True)
class StateDict:
    """A state dict, and where in its file it was."""

    tensors: Mapping[str, npt.NDArray[Any]]
    """PyTorch name → array."""
    key: str
    """The entry of the file that held it; empty where the file is the state dict."""
    others: tuple[str, ...]
    """Other entries that hold weights."""


def load_pickle(
    file: Path,
    key: str | None = None,
    *,
    averaged: bool = True,
    choose: Callable[[Iterable[str]], Iterable[str]] = list,
) -> StateDict:
    """The tensors of a state dict, unwrapped from ``{"model": ...}`` and the like.

    Unpickles with ``weights_only=True``: a file that wants to run code is refused. bfloat16
    comes back as float32, NumPy having no such type. Names lose the prefixes of parallel and
    compiled models.

    Args:
        key: the entry to read; default: as timm, the averaged (EMA) weights where there are any,
            else ``state_dict`` or ``model``, else the file itself.
        averaged: whether the default may be averaged weights.
        choose: which of the tensors' names are taken.

    Raises:
        CheckpointError: not such a file, one that holds more than tensors, or without the entry.
        MissingPackageError: torch is not installed.
    """
    content = _unpickle(file)
    import torch  # it is installed, then

    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a state dict.")
    found = [name for name, value in content.items() if isinstance(value, dict) and value]
    if key is None:
        wanted = (*(AVERAGED if averaged else ()), *_PLAIN)
        key = next((name for name in wanted if name in found), "")
    elif key not in found:
        have = f"it has {', '.join(map(str, found))}" if found else "it is a state dict itself"
        raise CheckpointError(f"{file} has no `weights_key` {key}; {have}.")
    state = content[key] if key else content
    for _ in _PLAIN:  # one in another
        state = next((state[n] for n in _PLAIN if isinstance(state.get(n), dict)), state)
    others = (name for name in found if name != key and _holds_tensors(content[name]))
    tensors = {str(name): t for name, t in state.items() if isinstance(t, torch.Tensor)}
    chosen = {name: tensors[name] for name in choose(tensors)}
    return StateDict(_to_arrays(chosen, file), key, tuple(map(str, others)))


def clean_names(names: Iterable[str], file: Path) -> dict[str, str]:
    """Name of a tensor as stored → without the prefixes of parallel and compiled models.

    Raises:
        CheckpointError: two tensors would have one name.
    """
    cleaned = {name: _clean(name) for name in names}
    if len(set(cleaned.values())) < len(cleaned):
        twice = next(n for n, short in cleaned.items() if n != short and short in cleaned)
        raise CheckpointError(f"{file} has both {cleaned[twice]} and {twice}; which is meant?")
    return cleaned


def _clean(name: str) -> str:
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # compiled in or around parallel
        name = name.removeprefix(prefix)
    return name


def _unpickle(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file.")
    try:
        import torch
    except ImportError:
        raise MissingPackageError(f"torch, which {file} needs to be read,", "torch") from None
    try:
        # DeiT's and timm's scripts store their arguments beside the weights; a Namespace holds
        # values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different one for each way a file is broken
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{file} holds more than tensors ({unsafe[1]}), which could run code; save its "
                "state dict alone, where you trust it."
            ) from None
        raise CheckpointError(
            f"{file} can't be read as a PyTorch checkpoint of plain tensors "
            f"({brief(error).split('. ')[0]})."
        ) from None


def _holds_tensors(state: Mapping[Any, Any]) -> bool:
    """Whether an entry may be a state dict: an optimizer's isn't, whose tensors lie deeper."""
    import torch

    return any(isinstance(value, torch.Tensor) for value in state.values())


def _to_arrays(found: Mapping[str, Any], file: Path) -> dict[str, npt.NDArray[Any]]:
    import torch

    known = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    tensors = {}
    for name, short in clean_names(found, file).items():
        tensor = found[name]
        if tensor.dtype not in known:
            raise CheckpointError(
                f"{file}: {name} is of type {tensor.dtype}; float32, float16, bfloat16 and "
                "float64 are read."
            )
        if tensor.layout != torch.strided:
            raise CheckpointError(f"{file}: {name} is a sparse tensor; dense ones are read.")
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        tensors[short] = tensor.detach().numpy()
    return tensors

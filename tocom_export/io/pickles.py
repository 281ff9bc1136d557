"""PyTorch's own checkpoint files (.pth, .pt, .bin), which need torch to be read."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..errors import CheckpointError, MissingPackageError, brief

_WRAPPERS = ("state_dict", "model", "module")


def load_pickle(file: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a state dict, unwrapped from ``{"model": ...}`` and the like.

    Unpickles with ``weights_only=True``: a file that wants to run code is refused. bfloat16
    comes back as float32, NumPy having no such type.

    Raises:
        CheckpointError: not such a file, or one that holds more than tensors.
        MissingPackageError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingPackageError(f"torch, which {file.suffix} files need,", "torch") from None
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file.")
    try:
        # DeiT's and timm's scripts store their arguments beside the weights; a Namespace holds
        # values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location="cpu", weights_only=True)
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
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not a state dict.")
    known = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    tensors = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            if tensor.dtype not in known:
                raise CheckpointError(
                    f"{file}: {name} is of type {tensor.dtype}; float32, float16, bfloat16 and "
                    "float64 are read."
                )
            if tensor.dtype == torch.bfloat16:
                tensor = tensor.float()
            tensors[str(name).removeprefix("module.")] = tensor.detach().numpy()
    return tensors

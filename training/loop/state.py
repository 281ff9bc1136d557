"""The state of a training run on disk: everything that the next step depends on."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tocom_export.errors import CheckpointError, brief
from tocom_export.io.atomic import replace_file


class StateFile:
    """Saves and resumes a run.

    Args:
        file: where; written beside and renamed.
        parts: what is saved under which name; each with ``state_dict`` and ``load_state_dict``.
        recipe: JSON that decides the outcome of the run; a state of another is refused.
    """

    def __init__(self, file: Path, parts: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
        self.file, self._parts = file, parts
        self._recipe: dict[str, Any] = json.loads(json.dumps(recipe))

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps."""
        state = {name: part.state_dict() for name, part in self._parts.items()}
        stream = io.BytesIO()  # torch reports a full disk as an error of its own
        torch.save({**state, "step": step, "recipe": json.dumps(self._recipe)}, stream)
        with replace_file(self.file) as beside:
            beside.write_bytes(stream.getbuffer())

    def resume(self) -> int:
        """Load the state, if there is one of this recipe; the number of steps done."""
        if not self.file.exists():
            return 0
        try:
            state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
            if differences := self._describe_differences(json.loads(state["recipe"])):
                raise CheckpointError(
                    f"{self.file} is of a run with another recipe ({'; '.join(differences)}). "
                    "Give the options it was started with, remove it, or name another `out`."
                )
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            return int(state["step"])
        except CheckpointError:
            raise
        except Exception as error:  # torch raises a different one for each way a file is broken
            raise CheckpointError(
                f"{self.file} is not a training state ({brief(error)}); remove it to start anew."
            ) from error

    def _describe_differences(self, theirs: dict[str, Any]) -> list[str]:
        """What the recipes don't have in common, in words; values only where they are short."""
        described = []
        for key in {**theirs, **self._recipe}:
            if theirs.get(key) != self._recipe.get(key):
                was, now = (json.dumps(recipe.get(key)) for recipe in (theirs, self._recipe))
                short = max(len(was), len(now)) <= 40
                described.append(f"{key} {was} there, {now} here" if short else key)
        return described


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of a module's weights: the part of a recipe that shapes don't tell."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def locate_state(out: Path) -> Path:
    """The file that holds the training state of a result until the result is written."""
    return out.with_name(f"{out.name}.state")

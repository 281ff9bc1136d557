"""A folder that timm's ``save_for_hf`` or ``push_to_hf_hub`` wrote → a model as we know them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..io.json_codec import decode
from ..io.tensors import Array
from .catalogue import REFERENCE
from .huggingface.files import CONFIG, read_record
from .preprocess import Preprocess
from .spec import VitSpec
from .timm_arguments import fit_arguments

_CROP = 0.875
"""timm's, where a configuration says none."""


@dataclass(frozen=True)
class TimmModel:
    """What a folder says, but for what the architecture's name stands for."""

    folder: Path
    architecture: str
    arguments: Mapping[str, Any]
    """What timm's ``create_model`` was told beside the name."""
    tensors: Mapping[str, Array]
    classes: tuple[str, ...] | None
    preprocess: Preprocess | None

    def make_spec(self, known: VitSpec) -> VitSpec:
        """The spec, from that of the architecture.

        Raises:
            CheckpointError: the folder contradicts itself.
            UnsupportedModelError: an argument that a spec can't express.
        """
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return fit_arguments(known, self.arguments, shapes, self.folder)


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is timm's; transformers wraps such models, and keeps its keys."""
    name, wrapped = config.get("architecture"), config.get("model_type") in (None, "timm_wrapper")
    named = isinstance(name, str) and re.fullmatch(r"\w+", name, re.ASCII) and name != REFERENCE
    return wrapped and bool(named)  # no name of ours, or that leads elsewhere: hf-hub:...


def is_timm_folder(folder: Path) -> bool:
    """Whether a folder has a ``config.json`` of timm's; one that can't be read is none."""
    try:
        return is_timm(read_record(folder / CONFIG))
    except CheckpointError:
        return False


def open_timm_folder(folder: Path, weights: Mapping[str, Array]) -> TimmModel:
    """Read a model that timm saved.

    Args:
        weights: timm's name → array.

    Raises:
        CheckpointError: ``config.json`` is broken, or contradicts the weights.
    """
    config = read_record(folder / CONFIG)
    told = config.get("pretrained_cfg", config)  # of old, there was one record
    arguments = config.get("model_args") or {}
    if not isinstance(told, dict) or not isinstance(arguments, dict):
        raise CheckpointError(f"{folder / CONFIG}: pretrained_cfg and model_args are objects.")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for pool in (config.get("global_pool"), told.get("global_pool")):
        if pool is not None:
            arguments.setdefault("global_pool", pool)
    size = told.get("input_size")
    if told.get("fixed_input_size") and isinstance(size, list):
        arguments.setdefault("img_size", size[1:])
    head, stem = (weights.get(f"{name}.weight") for name in ("head", "patch_embed.proj"))
    channels = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
    return TimmModel(
        folder,
        config["architecture"],
        arguments,
        weights,
        _read_classes(
            folder, {**told, **config}, head.shape[0] if head is not None and head.ndim == 2 else 0
        ),
        _read_preprocess(folder, told, channels),
    )


def _read_classes(folder: Path, config: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    """The names of the classes; the descriptions of those that have one."""
    labels = config.get("label_names") or config.get("labels")
    if not labels or not count:
        return None
    try:
        if isinstance(labels, dict):  # from index to name
            table = decode(dict[str, str], labels)
            found = [table.get(str(index), "") for index in range(len(table))]
        else:
            found = decode(list[str], labels)
        described = decode(dict[str, str], config.get("label_descriptions") or {})
    except InputError as error:
        raise CheckpointError(f"{folder / CONFIG}: label_names: {error}") from None
    if len(found) != count:
        raise CheckpointError(
            f"{folder}: label_names in {CONFIG} names {len(found)} classes, but the head has "
            f"{count}."
        )
    if "" in found:
        raise CheckpointError(
            f"{folder}: label_names in {CONFIG} has no name for class {found.index('')}."
        )
    if found == [f"LABEL_{index}" for index in range(count)]:  # of transformers, for want of any
        return None
    return tuple(described.get(name, name) for name in found)


def _read_preprocess(folder: Path, told: Mapping[str, Any], channels: int) -> Preprocess | None:
    keys = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
    given = {key: told[key] for key in keys if told.get(key) is not None}
    if not given:
        return None
    try:
        for key in ("mean", "std"):
            if isinstance(value := given.get(key), (int, float)):
                given[key] = value = [value]
            if isinstance(value, list) and channels in (1, 3) and len(value) != channels:
                given[key] = [sum(value) / len(value)] * channels  # as timm does
        return decode(Preprocess, {"crop_pct": _CROP, **given})
    except InputError as error:
        raise CheckpointError(f"{folder / CONFIG}: pretrained_cfg: {error}") from None
    except (TypeError, ArithmeticError):
        raise CheckpointError(
            f"{folder / CONFIG}: pretrained_cfg: mean and std are numbers."
        ) from None

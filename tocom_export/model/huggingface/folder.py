"""A folder that ``save_pretrained`` wrote → a model as we know them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.tensors import Array
from ..preprocess import Preprocess
from ..spec import VitSpec
from .config import describe
from .files import CONFIG, read_record
from .names import strip_names, to_timm
from .preprocessor import read_preprocess

_HUB = re.compile(r"models--.*?--(.+)")
_OURS = ("reference",)
"""Names that stand for models of this package."""


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a folder says."""

    spec: VitSpec
    tensors: Mapping[str, Array]
    """timm's name → array."""
    classes: tuple[str, ...] | None
    preprocess: Preprocess | None
    masked: bool
    """Trained as a masked autoencoder, whose attention isn't proportional when tokens merge."""


def is_folder(folder: Path) -> bool:
    """Whether a folder is of the hub's form, transformers' or timm's, and no bundle."""
    return (folder / CONFIG).exists() and not (folder / "manifest.json").exists()


def open_folder(folder: Path, weights: Mapping[str, Array]) -> HuggingFaceModel:
    """Read a model that transformers saved.

    Args:
        weights: transformers' name → array.

    Raises:
        CheckpointError: a file is missing or broken, or files contradict each other.
        UnsupportedModelError: it has a part that we don't read.
    """
    config = read_record(folder / CONFIG)
    tensors = strip_names(weights, folder)
    description = describe(config, folder, name_model(folder), tensors.keys())
    heads = [tensors[name] for name in description.heads if name in tensors]
    spec = description.make_spec(heads[0].shape[0] if heads and heads[0].ndim == 2 else 0)
    converted = to_timm(tensors, spec, folder)
    _check_positions(converted, spec, folder)
    classes = _read_classes(config, spec, folder)
    return HuggingFaceModel(
        spec, converted, classes, read_preprocess(folder, description.kind), description.masked
    )


def name_model(folder: Path) -> str:
    """What a folder is called, as a model's name; empty where that says nothing."""
    place = folder.absolute()
    if place.parent.name == "snapshots" and (hub := _HUB.fullmatch(place.parent.parent.name)):
        name = hub[1]  # the hub's cache calls the folder by a commit
    else:
        name = place.name
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", name).strip(".+-")
    return "" if name in _OURS else name


def _check_positions(tensors: Mapping[str, Array], spec: VitSpec, folder: Path) -> None:
    found = tensors.get("pos_embed")
    wanted = spec.weights().get("pos_embed")
    if found is None or wanted is None or found.ndim != 3 or found.shape[2] != spec.width:
        return
    if found.shape[1] != wanted[1]:
        size = "x".join(map(str, spec.image_size))
        raise CheckpointError(
            f"{folder}: the weights have {found.shape[1]} positions, but images of {size}, as "
            f"{CONFIG} has them, need {wanted[1]}. Correct image_size there."
        )


def _read_classes(config: Mapping[str, Any], spec: VitSpec, folder: Path) -> tuple[str, ...] | None:
    """The names of the classes, where they are more than placeholders."""
    names = config.get("id2label")
    if not spec.classes or not isinstance(names, dict):
        return None
    if len(names) != spec.classes:
        raise CheckpointError(
            f"{folder}: id2label in {CONFIG} names {len(names)} classes, but the head has "
            f"{spec.classes}."
        )
    found = [names.get(str(index)) for index in range(spec.classes)]
    if not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{folder}: id2label in {CONFIG} doesn't name classes 0 to {spec.classes - 1}."
        )
    placeholders = [f"LABEL_{index}" for index in range(spec.classes)]
    return None if found == placeholders else tuple(map(str, found))

"""A folder that ``save_pretrained`` wrote → a model as we know them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...io.tensors import Array, map_tensors
from ..preprocess import Preprocess
from ..spec import VitSpec
from .config import describe
from .files import CONFIG, read_record, read_stored
from .names import is_needed, strip_prefix, to_timm
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


def is_huggingface(names: Iterable[str]) -> bool:
    """Whether tensors have the names that transformers gives them."""
    return any(re.search(r"(^|\.)embeddings\.patch_embeddings?\.", name) for name in names)


def is_folder(folder: Path) -> bool:
    """Whether a folder is such a one, and no bundle."""
    return (folder / CONFIG).exists() and not (folder / "manifest.json").exists()


def open_folder(folder: Path, file: Path | None = None) -> HuggingFaceModel:
    """Read a model that transformers saved.

    Args:
        file: a weights file in the folder; default: ``model.safetensors``, or the shards.

    Raises:
        CheckpointError: a file is missing or broken, or files contradict each other.
        UnsupportedModelError: it has a part that we don't read.
    """
    config = read_record(folder / CONFIG)
    stored = read_stored(folder, file)
    short = {name: strip_prefix(name) for name in stored if is_needed(strip_prefix(name))}
    description = describe(config, folder, name_model(folder), set(short.values()))
    heads = [name for name in short if short[name] in description.heads]
    shape = stored[heads[0]].shape if heads else ()
    spec = description.make_spec(shape[0] if len(shape) == 2 else 0)
    kept = {name: stored[name] for name in short if not description.leaves_out(short[name])}
    tensors: dict[str, Array] = {}
    for each in sorted({tensor.file for tensor in kept.values()}):
        mapped = map_tensors({name: t for name, t in kept.items() if t.file == each})
        tensors |= {short[name]: array for name, array in mapped.items()}
    converted = to_timm(tensors, spec, folder)
    _check_positions(converted, spec, folder)
    classes = None if description.embeds else _read_classes(config, spec, folder)
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

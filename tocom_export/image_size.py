"""A checkpoint's weights for images of another size than they are of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .compression.checkpoint import Checkpoint
from .errors import InputError
from .model.catalogue import is_known, known_model
from .model.from_tensors import find_image_size
from .model.resizing import list_positions, resize_positions
from .model.spec import VitSpec


def resize(
    spec: VitSpec, checkpoint: Checkpoint, image_size: tuple[int, int] | None
) -> tuple[VitSpec, Checkpoint, str]:
    """Spec and weights for images of another size, and a line for people where that changes them.

    Args:
        spec: what the weights are of.
        image_size: height and width, pixels; None changes nothing.

    Raises:
        InputError: see :func:`~tocom_export.model.resizing.resize_positions`.
    """
    if image_size is None or image_size == spec.image_size:
        return spec, checkpoint, ""
    resized, tensors = resize_positions(spec, checkpoint.tensors, image_size)
    info = checkpoint.info
    if info.spec is not None:
        own = dataclasses.replace(info.spec, image_size=image_size)
        info = dataclasses.replace(info, spec=own)
    made = dataclasses.replace(checkpoint, tensors=tensors, info=info)
    return resized, made, _explain(spec, resized, checkpoint.file)


def resize_for(spec: VitSpec, checkpoint: Checkpoint) -> tuple[Checkpoint, str]:
    """Other weights of a bundle's model for its image size, as ``build`` would make them.

    Unless they say what they are of, those that already have as many positions stay as they are.
    Where nothing says it, or patches don't fill the bundle's images, they are left to
    :func:`~tocom_export.bundle.weights.check_same_model`.
    """
    told, now = checkpoint.info.spec, spec.image_size
    if told is None:
        wanted = spec.weights()
        fits = [
            name in checkpoint.tensors and checkpoint.tensors[name].shape == wanted[name]
            for name in list_positions(spec)
        ]
        if fits and all(fits):
            return checkpoint, ""
        named = known_model(spec.model)[0].image_size if is_known(spec.model) else now
        of = dataclasses.replace(spec, image_size=named)
        shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
        size = find_image_size(of, shapes, now)
        told = None if size is None else dataclasses.replace(spec, image_size=size)
    if told is None or told.patch_size != spec.patch_size:
        return checkpoint, ""
    try:
        return resize(told, checkpoint, now)[1:]
    except InputError:
        return checkpoint, ""


def _explain(old: VitSpec, new: VitSpec, file: Path) -> str:
    if old.grid == new.grid:
        return ""
    before, after = ("×".join(map(str, spec.grid)) for spec in (old, new))
    done = f"resampled from {before} to {after} patches"
    if not list_positions(old):
        done = f"computed for {after} patches, and the weights are of {before}"
    return (
        f"{file}: positions are {done}; accuracy at another size than trained may differ; finetune "
        "adapts."
    )

"""A model for images of another size: its positions change, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from ..errors import InputError
from .resampling import resample_positions, resample_table
from .spec import MOST_PATCHES, VitSpec
from .weight_names import relative_name


def list_positions(spec: VitSpec) -> list[str]:
    """The tensors whose shapes depend on the image size; none where positions are computed."""
    names = ["pos_embed"] if spec.positions else []
    if spec.relative == "table":
        places = (relative_name(spec, layer) for layer in range(spec.depth))
        names += [f"{place}.relative_position_bias_table" for place in places]
    return names


def resize_positions(
    spec: VitSpec, tensors: Mapping[str, npt.NDArray[Any]], image_size: tuple[int, int]
) -> tuple[VitSpec, dict[str, npt.NDArray[Any]]]:
    """Spec and weights for another image size: positions as timm resamples them, the rest as it is.

    Args:
        tensors: PyTorch name → array, as ``spec`` has it; empty for none. What ``spec`` hasn't so
            is left as it is.
        image_size: height and width, pixels, that patches must fill.

    Raises:
        InputError: patches don't fill such images, or too many do.
    """
    if image_size == spec.image_size:
        return spec, dict(tensors)
    filled = tuple(
        max(1, round(side / patch)) * patch
        for side, patch in zip(image_size, spec.patch_size, strict=True)
    )
    asked, patch, near = ("×".join(map(str, s)) for s in (image_size, spec.patch_size, filled))
    if image_size != filled:
        raise InputError(
            f"`image_size` {asked}: {spec.model} cuts images into patches of {patch}, which must "
            f"fill them; {near} would do."
        )
    patches = math.prod(image_size) // math.prod(spec.patch_size)
    if patches > MOST_PATCHES:
        raise InputError(
            f"`image_size` {asked}: that is {patches:,} patches of {patch}; "
            f"{MOST_PATCHES:,} is the most."
        )
    resized = dataclasses.replace(spec, image_size=image_size)
    made, shapes = dict(tensors), spec.weights()
    old, new = spec.grid, resized.grid
    for name in list_positions(spec) if old != new else ():
        if name not in tensors or tensors[name].shape != shapes[name]:
            continue
        if name == "pos_embed":
            prefix = spec.prefix if spec.prefix_positions else 0
            made[name] = resample_positions(tensors[name], prefix, old, new)
        else:
            made[name] = resample_table(tensors[name], old, new)
    return resized, made

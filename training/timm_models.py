"""What timm knows of a model's name, and positions for another image size."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from timm.layers import resample_abs_pos_embed

from tocom_export.errors import CheckpointError, InputError, UnknownModelError, brief
from tocom_export.model.from_timm import preprocess_from_cfg, spec_from_timm
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec


def spec_of_name(model: str) -> VitSpec:
    """The spec of a timm model, without making its weights.

    Raises:
        UnknownModelError, UnsupportedModelError: timm has none, or a spec can't express it.
    """
    architecture = model.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UnknownModelError(f"`model` {model}: timm has no model of that name.{hint}")
    with torch.device("meta"):
        return spec_from_timm(timm.create_model(architecture, pretrained=False), name=architecture)


def preprocess_of_name(name: str) -> Preprocess:
    """The image statistics that timm keeps for a model, ``name`` or ``name.tag``."""
    cfg = timm.get_pretrained_cfg(name)
    return preprocess_from_cfg(cfg.to_dict() if cfg else {})


def pretrained_tensors(name: str) -> dict[str, npt.NDArray[Any]]:
    """timm's pretrained weights for a model, downloaded or from its cache."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each retry
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network and cache errors share no base class
        raise CheckpointError(
            f"the pretrained weights of {name} can't be downloaded ({brief(error)}). "
            "Give its weights as `checkpoint` FILE."
        ) from None
    return {key: tensor.numpy() for key, tensor in model.state_dict().items()}


def resize_positions(
    spec: VitSpec, tensors: Mapping[str, npt.NDArray[Any]], image_size: tuple[int, int]
) -> tuple[VitSpec, dict[str, npt.NDArray[Any]]]:
    """Spec and weights for another image size: timm's bicubic positions, the rest as it is.

    Args:
        tensors: PyTorch name → array, as ``spec`` has it; empty for none.
        image_size: height and width, pixels, that patches must fill.
    """
    if image_size == spec.image_size:
        return spec, dict(tensors)
    filled = tuple(
        max(1, round(side / patch)) * patch
        for side, patch in zip(image_size, spec.patch_size, strict=True)
    )
    if image_size != filled:
        asked, patch, near = ("×".join(map(str, s)) for s in (image_size, spec.patch_size, filled))
        raise InputError(
            f"`image_size` {asked}: {spec.model} cuts images into patches of {patch}, which must "
            f"fill them; {near} would do."
        )
    resized = dataclasses.replace(spec, image_size=image_size)
    if "pos_embed" not in tensors:
        return resized, dict(tensors)
    positions = resample_abs_pos_embed(
        torch.from_numpy(np.array(tensors["pos_embed"], np.float32)),  # (1, prefix + patches, C)
        new_size=list(resized.grid),
        old_size=list(spec.grid),
        num_prefix_tokens=spec.prefix if spec.prefix_positions else 0,
    )
    return resized, {**tensors, "pos_embed": positions.numpy()}

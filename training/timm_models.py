"""What timm knows of a model's name."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import numpy.typing as npt
import timm
import torch

from tocom_export.errors import CheckpointError, UnknownModelError, brief
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

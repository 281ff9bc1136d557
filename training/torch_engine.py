"""The PyTorch model of a checkpoint or a bundle: what an engine's outputs are held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from torch import nn

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.method import Method
from tocom_export.graph.quantising import dequantize
from tocom_export.model.spec import VitSpec

from .lora import TrainableBank
from .model import CompressedVit
from .timm_models import vit_from_spec


def load_model(
    spec: VitSpec,
    tensors: Mapping[str, npt.NDArray[Any]],
    method: Method,
    *,
    drop_path: float = 0.0,
) -> CompressedVit:
    """A compressed ViT with those weights, float32, in evaluation mode."""
    vit = vit_from_spec(spec, drop_path)
    load_weights(vit, tensors)
    return CompressedVit(vit, method, spec.model).eval()


def load_weights(
    vit: nn.Module, tensors: Mapping[str, npt.NDArray[Any]], *, strict: bool = False
) -> None:
    """Copy weights into a model; unless strict, a tensor that isn't given stays as it is."""
    state = {name: torch.from_numpy(np.array(t, np.float32)) for name, t in tensors.items()}
    vit.load_state_dict(state, strict=strict)


class Reference:
    """The logits that a bundle's engines should give.

    Args:
        bundle: whose uncompensated weights, method and targets to use. The model is float32;
            int8 weights are what they stand for.
        bank: adds the gap as low-rank side paths, which checks the baking too; without it
            the bundle's own baked weights are loaded into the model.
    """

    def __init__(self, bundle: Bundle, bank: ToComBank | None = None) -> None:
        self._bundle = bundle
        self._model = CompressedVit(vit_from_spec(bundle.spec), bundle.method, bundle.spec.model)
        self._model.eval()
        self._bank = TrainableBank.from_bank(bank, bundle.spec) if bank else None
        self._loaded: int | None = None

    @torch.inference_mode()
    def __call__(self, target: int, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits (B, classes) of normalised images (B, C, H, W) at a target of the bundle."""
        bundle = self._bundle
        if self._loaded is None or (self._loaded != target and self._bank is None):
            shared, *own = bundle.weight_files(target)
            stored = load_file(shared)
            for file in own if self._bank is None else ():
                stored.update(load_file(file))
            load_weights(self._model.vit, dequantize(stored), strict=True)
            self._loaded = target
        side = self._bank.side(bundle.source, target, bundle.scale) if self._bank else None
        logits: npt.NDArray[np.float32] = self._model(
            torch.from_numpy(images), target, side
        ).numpy()
        return logits

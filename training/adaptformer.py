"""AdaptFormer: a small branch beside each MLP, trained where the backbone stays as it is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from tocom_export.errors import InputError
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.model.weight_names import HEADS


class AdaptedMlp(Mlp):
    """A timm MLP with AdaptFormer's branch on the same input.

    ::

        LN(x) ─┬─ fc1 ── act ── fc2 ──────────────────────────┬─ + ─
               └─ adapter_down ── ReLU ── adapter_up ── · s ──┘

    The block adds x to it (the paper's appendix on VTAB-1k). The branch lies inside
    ``block.mlp``, hence inside the block's LayerScale and drop path where a model has them.

    Args:
        mlp: whose parts it takes over, under the names they had.
        width: the branch's bottleneck.
        scale: ``s``; not in the state dict. :func:`merge_adapter_scale` is what to save.
    """

    def __init__(self, mlp: Mlp, width: int, scale: float) -> None:
        nn.Module.__init__(self)  # Mlp's own would make layers that are replaced at once
        for name, part in mlp.named_children():
            self.add_module(name, part)
        like = mlp.fc1.weight  # (M, C)
        channels = like.shape[1]
        # nn.Linear's own initial weight, Kaiming-uniform with a = √5, is AdaptFormer's.
        self.adapter_down = nn.Linear(channels, width, device=like.device, dtype=like.dtype)
        self.adapter_up = nn.Linear(width, channels, device=like.device, dtype=like.dtype)
        for zero in (self.adapter_down.bias, *self.adapter_up.parameters()):
            nn.init.zeros_(zero)  # at first the model is as it was without the branch
        self.scale = scale
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        out: Tensor = Mlp.forward(self, x)
        branch: Tensor = self.adapter_up(F.relu(self.adapter_down(x)))
        return out + branch * self.scale


def add_adapters(vit: nn.Module, adapter_width: int = 32, scale: float = 0.1) -> None:
    """Give each MLP of a timm ViT an AdaptFormer branch, in place.

    The model's outputs stay what they are. A model that has adapters goes on with them: a
    checkpoint holds them with their scale merged, so they are divided by ``scale`` again.

    Args:
        scale: ``s``, positive; the paper takes it from {0.01, 0.1, 1, 10, 100}.

    Raises:
        InputError: the model's adapters are of another width, its MLPs are gated, or a spec can't
            express it.
    """
    spec = spec_from_timm(vit)
    if spec.mlp != "plain":
        raise InputError(
            f"`adapter_width`: {spec.model} has gated MLPs, beside which no adapter stands."
        )
    has = spec.adapter_width
    if has not in (0, adapter_width):
        raise InputError(
            f"`adapter_width` {adapter_width}: the model's adapters have a bottleneck of {has}; "
            f"choose `adapter_width` {has}, or start from a checkpoint without adapters."
        )
    model: Any = vit
    for block in model.blocks:
        if not has:
            block.mlp = AdaptedMlp(block.mlp, adapter_width, scale)
            continue
        with torch.no_grad():
            for up in block.mlp.adapter_up.parameters():
                up.mul_(block.mlp.scale / scale)
        block.mlp.scale = scale


def freeze_all_but_adapters(vit: nn.Module) -> None:
    """Leave only the adapters and the head (both heads of a distilled model) to train."""
    for name, parameter in vit.named_parameters():
        trained = name.startswith(HEADS) or ".mlp.adapter_" in name
        parameter.requires_grad_(trained)


def merge_adapter_scale(vit: nn.Module) -> dict[str, Tensor]:
    """A timm ViT's state dict as a checkpoint holds it: the scale is in ``adapter_up``."""
    state: dict[str, Tensor] = vit.state_dict()
    for name, module in vit.named_modules():
        if isinstance(module, AdaptedMlp):
            for up in (f"{name}.adapter_up.weight", f"{name}.adapter_up.bias"):
                state[up] = state[up] * module.scale
    return state

"""Pruning tokens (EViT): those that the class token attends to least."""

from __future__ import annotations

import torch
from torch import Tensor

from .matching import take


def prune(tokens: Tensor, attention: Tensor, remove: int, prefix: int) -> Tensor:
    """Drop the ``remove`` patch tokens that the class token attends to least.

    Args:
        tokens: (B, N, C); returned as (B, N - remove, C), in their original order.
        attention: the class token's attention, averaged over heads (B, N).
        prefix: number of protected tokens, which stay in front.
    """
    patches = attention[:, prefix:]
    kept = patches.topk(patches.shape[1] - remove, dim=-1).indices.sort(dim=-1).values
    return torch.cat([tokens[:, :prefix], take(tokens, prefix + kept)], dim=1)

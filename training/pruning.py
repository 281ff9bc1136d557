"""Pruning tokens (EViT): those that the class token attends to least."""

from __future__ import annotations

import torch
from torch import Tensor

from .matching import take


def prune(tokens: Tensor, attention: Tensor, remove: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Drop the ``remove`` patch tokens that the class token attends to least.

    What is left stands in the order of its attention, as it does in a graph: of equally attended
    tokens those behind go, in this layer as in the next.

    Args:
        tokens: (B, N, C); returned as (B, N - remove, C).
        attention: the class token's attention, averaged over heads (B, N).
        prefix: number of protected tokens, which stay in front.

    Returns:
        The tokens that are left, and their positions (B, N - remove), int64.
    """
    patches = attention[:, prefix:]
    order = patches.argsort(dim=-1, descending=True, stable=True)  # topk breaks ties anyhow
    kept = order[:, : patches.shape[1] - remove]
    fixed = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
    left = torch.cat([fixed, prefix + kept], dim=1)
    return take(tokens, left), left


def drop_map(kept: Tensor, tokens: int) -> Tensor:
    """Position of each of N tokens after pruning (B, N), int64; -1 where it was dropped.

    Args:
        kept: positions of those that are left, in their new order (B, N - r).
        tokens: N.
    """
    places = torch.full((len(kept), tokens), -1, device=kept.device)
    order = torch.arange(kept.shape[1], device=kept.device).expand(len(kept), -1)
    return places.scatter(1, kept, order)

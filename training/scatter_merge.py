"""Merging as it is commonly written, to be compared with: one scatter with a reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import CompressedVit


def usual_merge(
    x: Tensor, size: Tensor, metric: Tensor, remove: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """What :func:`~tocom_export.training.matching.merge` does, by slices, gathers and a scatter.

    Tokens are taken in turns from the first on, a class token among them, whose similarity is
    then put out of reach.

    Args:
        x: tokens (B, N, C).
        size: how many original tokens each one stands for (B, N, 1).
        metric: (B, N, D).
        prefix: number of protected tokens, 0 or 1.

    Returns:
        Tokens (B, N - remove, C) and sizes (B, N - remove, 1).
    """
    scores = torch.nn.functional.normalize(metric.float(), dim=-1)
    scores = scores[:, ::2] @ scores[:, 1::2].transpose(1, 2)  # (B, A, B)
    scores[:, :prefix] = -torch.inf
    best, into = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    kept, merged = order[:, remove:].sort(dim=1).values, order[:, :remove]
    into = into[..., None].gather(1, merged)

    def pool(tokens: Tensor) -> Tensor:
        wide = tokens.shape[-1]
        first, second = tokens[:, ::2], tokens[:, 1::2]
        source = first.gather(1, merged.expand(-1, -1, wide))
        second = second.scatter_reduce(1, into.expand(-1, -1, wide), source, reduce="sum")
        return torch.cat([first.gather(1, kept.expand(-1, -1, wide)), second], dim=1)

    weighted, size = pool(x * size), pool(size)
    return weighted / size, size


class UsualVit(CompressedVit):
    """The compressed ViT with :func:`usual_merge`."""

    merge = staticmethod(usual_merge)

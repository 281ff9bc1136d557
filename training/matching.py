"""Removing tokens from a layer: merging (ToMe) and pruning (EViT).

Both leave the ``prefix`` protected tokens (class, distillation, registers) alone and in front.
Positions count the prefix, so which patch tokens are set A (even positions) and which set B
(odd) depends on it::

    position   0    1   2   3   4   5   6          prefix = 1
               cls  B   A   B   A   B   A
    after      cls  kept A, in order   B, each with the A tokens merged into it
"""

from __future__ import annotations

import torch
from torch import Tensor


def match(metric: Tensor, remove: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching: which A tokens go, and into which B token.

    Every A token proposes to the B token most like it (cosine similarity); the ``remove``
    best proposals are accepted.

    Args:
        metric: what similarity is measured on, keys averaged over heads, (B, N, D).
        remove: number of tokens to merge away, at most ``(N - prefix) // 2``.
        prefix: number of protected tokens.

    Returns:
        Positions of the kept A tokens in order (B, A - remove), positions of the merged A
        tokens (B, remove), and each one's B token as an index into set B (B, remove).
    """
    first_a, first_b = _first(prefix)
    # Autocast would compare in bfloat16, where near 1 all similarities are alike: a model would be
    # trained on other merges than those its engines make.
    with torch.autocast(metric.device.type, enabled=False):
        metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, first_a::2] @ metric[:, first_b::2].transpose(1, 2)  # (B, A, B)
    best, into = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, kept = order[:, :remove], order[:, remove:].sort(dim=-1).values
    return first_a + 2 * kept, first_a + 2 * merged, into.gather(1, merged)


def merge(
    x: Tensor, size: Tensor, metric: Tensor, remove: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """Merge the ``remove`` most similar pairs into averages weighted by token size.

    Args:
        x: tokens (B, N, C).
        size: how many original tokens each one stands for (B, N, 1).

    Returns:
        Tokens (B, N - remove, C) and sizes (B, N - remove, 1).
    """
    kept, merged, into = match(metric, remove, prefix)
    _, first_b = _first(prefix)
    weighted = x * size

    def pool(tokens: Tensor) -> Tensor:
        b = tokens[:, first_b::2]
        b = b.scatter_add(1, _wide(into, tokens), _take(tokens, merged))
        return torch.cat([tokens[:, :prefix], _take(tokens, kept), b], dim=1)

    size = pool(size)
    return pool(weighted) / size, size


def prune(x: Tensor, attention: Tensor, remove: int, prefix: int) -> Tensor:
    """Drop the ``remove`` patch tokens that the class token attends to least.

    Args:
        x: tokens (B, N, C).
        attention: the class token's attention, averaged over heads (B, N).

    Returns:
        Tokens (B, N - remove, C), in their original order.
    """
    patches = attention[:, prefix:]
    kept = patches.topk(patches.shape[1] - remove, dim=-1).indices.sort(dim=-1).values
    return torch.cat([x[:, :prefix], _take(x, prefix + kept)], dim=1)


def _first(prefix: int) -> tuple[int, int]:
    """Positions of the first A (even) and the first B (odd) patch token."""
    return prefix + prefix % 2, prefix + 1 - prefix % 2


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, like.shape[-1])  # (B, n, C)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, _wide(index, tokens))  # (B, n, C)

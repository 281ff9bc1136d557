"""Merging tokens (ToMe): which tokens go where, as a value; applied and undone.

The ``prefix`` protected tokens (class, distillation, registers) stay alone and in front.
Positions count the prefix, so which patch tokens are set A (even positions) and which set B
(odd) depends on it::

    position   0    1   2   3   4   5   6          prefix = 1
               cls  B   A   B   A   B   A
    after      cls  kept A, in order   B, each with the A tokens merged into it

Where 2 goes into 5, the map of tokens has the same place for both, and unmerging copies what
stands there back to both::

    after      cls  4   6   1   3   2+5
    position   0    1   2   3   4   5   6
    map        0    3   5   4   1   5   2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tocom_export.compression.method import LEAST_LENGTH


@dataclass(frozen=True, eq=False)
class Matching:
    """Which of N tokens go where when r of them are merged.

    The order after the merge is ``[prefix, kept A, B]``.
    """

    kept: Tensor
    """Positions of the A tokens that stay, in order (B, A - r), int64."""
    merged: Tensor
    """Positions of the A tokens that go, the best match first (B, r), int64."""
    into: Tensor
    """The B token of each, as an index into set B (B, r), int64."""
    tokens: int
    """N."""
    prefix: int
    """Protected tokens."""

    def keep(self, places: Tensor | None) -> Tensor:
        """Which first token each of those that stay was (B, N - r), in their new order, int64.

        Args:
            places: the same before (B, N); None where none has gone yet.
        """
        if places is None:
            places = torch.arange(self.tokens, device=self.kept.device).expand(len(self.kept), -1)
        first, b = places[:, : self.prefix], places[:, _first_b(self.prefix) :: 2]
        return torch.cat([first, places.gather(1, self.kept), b], dim=1)


def match(metric: Tensor, remove: int, prefix: int) -> Matching:
    """Bipartite soft matching: which A tokens go, and into which B token.

    Every A token proposes to the B token most like it (cosine similarity); the ``remove``
    best proposals are accepted.

    Args:
        metric: what similarity is measured on, keys averaged over heads, (B, N, D).
        remove: number of tokens to merge away, r, at most ``(N - prefix) // 2``.
        prefix: number of protected tokens.
    """
    first_a, first_b = prefix + prefix % 2, _first_b(prefix)
    # Autocast would compare in bfloat16, where near 1 all similarities are alike: a model would be
    # trained on other merges than those its engines make.
    with torch.autocast(metric.device.type, enabled=False):
        metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
        metric = normalize(metric, dim=-1, eps=LEAST_LENGTH)
        scores = metric[:, first_a::2] @ metric[:, first_b::2].transpose(1, 2)  # (B, A, B)
    best, into = scores.max(dim=-1)  # (B, A)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged, kept = order[:, :remove], order[:, remove:].sort(dim=-1).values
    kept, into = first_a + 2 * kept, into.gather(1, merged)
    return Matching(kept, first_a + 2 * merged, into, metric.shape[1], prefix)


def merge(matching: Matching, tokens: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Merge tokens (B, N, C) into averages (B, N - r, C) weighted by their sizes.

    Args:
        size: how many original tokens each one stands for (B, N, 1); returned as (B, N - r, 1).
    """
    total = merge_sum(matching, size)
    return merge_sum(matching, tokens * size) / total, total


def merge_sum(matching: Matching, tokens: Tensor) -> Tensor:
    """Add merged tokens up: (B, N, C), of any dtype → (B, N - r, C)."""
    b = tokens[:, _first_b(matching.prefix) :: 2]
    b = b.scatter_add(1, widen(matching.into, tokens), take(tokens, matching.merged))
    return torch.cat([tokens[:, : matching.prefix], take(tokens, matching.kept), b], dim=1)


def unmerge(matching: Matching, tokens: Tensor) -> Tensor:
    """Copy to every original position the token it went into: (B, N - r, C) → (B, N, C)."""
    return take(tokens, token_map(matching))


def token_map(matching: Matching) -> Tensor:
    """Position of each token after the merge, (B, N) int64."""
    kept, merged = matching.kept, matching.merged
    places = torch.arange(matching.tokens, device=kept.device).expand(len(kept), -1)  # (B, N)
    prefix, b = places[:, : matching.prefix], places[:, _first_b(matching.prefix) :: 2]
    before = torch.cat([prefix, kept, b, merged], dim=1)  # (B, N), each position once
    left = matching.tokens - merged.shape[1]
    after = torch.cat([places[:, :left], left - b.shape[1] + matching.into], dim=1)  # (B, N)
    return torch.empty_like(before).scatter(1, before, after)


def follow(places: Tensor | None, step: Tensor) -> Tensor:
    """Where tokens are one step further (B, N0), int64; -1 where they were dropped.

    Args:
        places: where each first token is (B, N0); None where all are still where they were.
        step: where each of those goes (B, N); -1 where it is dropped.
    """
    if places is None:
        return step
    return step.gather(1, places.clamp(min=0)).where(places >= 0, -1)


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """Tokens (B, N, C) at some positions (B, n) of each image → (B, n, C)."""
    return tokens.gather(1, widen(positions, tokens))


def widen(positions: Tensor, like: Tensor) -> Tensor:
    """Positions (B, n) → (B, n, C), once for each channel of ``like``, for gather and scatter."""
    return positions[..., None].expand(-1, -1, like.shape[-1])


def _first_b(prefix: int) -> int:
    """The first odd position behind the prefix."""
    return prefix + 1 - prefix % 2

"""Merging as it is commonly written, to be compared with: one scatter with a reduction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tocom_export.compression.method import LEAST_LENGTH

from .matching import Matching, take, widen
from .model import CompressedVit


def scatter_match(metric: Tensor, remove: int, prefix: int) -> Matching:
    """What :func:`~tocom_export.training.matching.match` does, by slices and a mask.

    Tokens are taken in turns from the first on, a class token among them (``prefix`` is 0 or
    1), whose similarity is then put out of reach.
    """
    scores = normalize(metric.float(), dim=-1, eps=LEAST_LENGTH)
    scores = scores[:, ::2] @ scores[:, 1::2].transpose(1, 2)  # (B, A, B)
    scores[:, :prefix] = -torch.inf
    best, into = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    kept, merged = order[:, remove:].sort(dim=1).values, order[:, :remove]
    into = into.gather(1, merged)  # (B, r)
    return Matching(2 * kept[:, prefix:], 2 * merged, into, metric.shape[1], prefix)


def scatter_merge(matching: Matching, tokens: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`~tocom_export.training.matching.merge` does, by gathers and a scatter."""

    def pool(x: Tensor) -> Tensor:
        source, into = take(x, matching.merged), widen(matching.into, x)
        b = x[:, 1::2].scatter_reduce(1, into, source, reduce="sum")
        return torch.cat([x[:, : matching.prefix], take(x, matching.kept), b], dim=1)

    weighted, size = pool(tokens * size), pool(size)
    return weighted / size, size


class ScatterMergeVit(CompressedVit):
    """The compressed ViT with :func:`scatter_match` and :func:`scatter_merge`."""

    match = staticmethod(scatter_match)
    merge = staticmethod(scatter_merge)

"""Merging tokens (ToMe) in a graph: which tokens go where, applied and undone.

The same arithmetic as :mod:`tocom_export.training.matching`, in operators that every runtime
has: no scatter (parsers reject it or send it to plugins), no ``-inf`` masks, no sorting but
TopK. Every shape but the batch is static. Tokens and sizes are of the stream; similarities are
float32 in every precision. A merging step, matching included, is 32 nodes, most of them on a
few numbers: what is done with all tokens is one gather, one product and one sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..compression.method import LEAST_LENGTH
from .builder import FLOAT, GraphBuilder


@dataclass(frozen=True)
class Matching:
    """Which of N tokens go where when r of them are merged, as values of a graph.

    Behind the prefix, tokens at even positions are set A, those at odd ones set B. After the
    merge the order is ``[prefix, kept A, B]``.
    """

    kept: ir.Value
    """Positions of the tokens that stay, in their new order (B, N - r, 1), int64."""
    merged: ir.Value
    """Positions of the A tokens that go, the best match first (B, r, 1), int64."""
    into: ir.Value
    """The place of each after the merge (B, r, 1), int64."""
    one_hot: ir.Value
    """The same in the stream's type, to add tokens by a product (B, N - r, r)."""
    tokens: int
    """N."""
    removed: int
    """r."""


def match(builder: GraphBuilder, keys: ir.Value, tokens: int, remove: int, prefix: int) -> Matching:
    """Match the ``remove`` most similar pairs of patch tokens.

    Args:
        keys: (B, H, N, D), in the type that is computed in.
        tokens: N.
        remove: number of tokens to merge away, r, at most ``(N - prefix) // 2``.
        prefix: number of protected tokens.
    """
    # int64 by name: elsewhere than on Linux NumPy's own whole numbers may be int32.
    set_a = np.arange(prefix + prefix % 2, tokens, 2, dtype=np.int64)
    set_b = np.arange(prefix + 1 - prefix % 2, tokens, 2, dtype=np.int64)
    keys = builder.cast(keys, builder.types.compute, FLOAT)
    metric = builder.op("ReduceMean", keys, builder.ints(1), keepdims=0)  # (B, N, D)
    length = builder.op("ReduceL2", metric, builder.ints(2))  # (B, N, 1)
    # Without a floor a token without keys is like all others by NaN, which each runtime sorts
    # elsewhere.
    length = builder.op("Max", length, builder.floats(LEAST_LENGTH, dtype=FLOAT))
    metric = builder.op("Div", metric, length)
    metric_a, metric_b = (
        builder.op("Gather", metric, builder.constant(f"set_{s[0]}_{tokens}", s), axis=1)
        for s in (set_a, set_b)
    )
    scores = builder.op("MatMul", metric_a, builder.op("Transpose", metric_b, perm=(0, 2, 1)))
    best, into = builder.ops("TopK", scores, builder.ints(1), outputs=2, axis=2)  # (B, A, 1)
    _, order = builder.ops("TopK", best, builder.ints(len(set_a)), outputs=2, axis=1)
    stay = len(set_a) - remove
    if stay:
        lengths = builder.ints(remove, stay)
        merged, kept = builder.ops("Split", order, lengths, outputs=2, axis=1)
        kept = _sort(builder, kept, stay)[0]  # back in the original order
    else:
        merged, kept = order, None
    into = builder.op("GatherND", into, merged, batch_dims=1)  # (B, r, 1)
    into = builder.op("Add", into, builder.ints(prefix + stay))
    positions = builder.constant(f"set_a_{tokens}_{prefix}", set_a)
    merged = builder.op("Gather", positions, merged)

    # Padding and adding a constant stands in for a Concat with one, which would have to be
    # expanded to the batch. Where all of set A goes, there is nothing to pad but zero.
    known = np.concatenate([np.arange(prefix), np.zeros(stay, np.int64), set_b])
    if kept is None:
        kept = builder.op("Mul", builder.cut(merged, 1, 0, 1), builder.ints(0))
    else:
        kept = builder.op("Gather", positions, kept)
        kept = builder.op("Pad", kept, builder.ints(0, prefix, 0, 0, len(set_b), 0))
    kept = builder.op("Add", kept, _column(builder, f"known_{tokens}_{prefix}_{stay}", known))

    bits = builder.floats(0.0, 1.0, dtype=FLOAT)  # float32: ONNX Runtime has no OneHot of bfloat16
    one_hot = builder.op("OneHot", into, builder.ints(tokens - remove), bits, axis=1)
    one_hot = builder.op("Squeeze", one_hot, builder.ints(3))  # (B, N - r, r)
    one_hot = builder.cast(one_hot, FLOAT, builder.types.stream)
    return Matching(kept, merged, into, one_hot, tokens, remove)


def merge(
    builder: GraphBuilder, matching: Matching, x: ir.Value, size: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Merge tokens into averages weighted by their sizes.

    What is merged pulls the token that it goes into towards itself, by its share of the whole:
    tokens that nothing goes into, and those that are equal to what does, stay what they are in
    every precision.

    Args:
        x: tokens (B, N, C).
        size: their sizes (B, N, 1); None before the first merge, when all are 1.

    Returns:
        Tokens (B, N - r, C) and their sizes (B, N - r, 1).
    """
    left = builder.op("GatherND", x, matching.kept, batch_dims=1)  # (B, N - r, C)
    pull = builder.op("GatherND", x, matching.merged, batch_dims=1)
    pull = builder.op("Sub", pull, builder.op("GatherND", left, matching.into, batch_dims=1))
    if size is None:
        own = builder.floats(1.0, dtype=builder.types.stream)
        added = builder.op("ReduceSum", matching.one_hot, builder.ints(2))
    else:
        own = builder.op("GatherND", size, matching.kept, batch_dims=1)
        size = builder.op("GatherND", size, matching.merged, batch_dims=1)  # (B, r, 1)
        added = builder.op("MatMul", matching.one_hot, size)
        pull = builder.op("Mul", pull, size)  # (B, r, C)
    total = builder.op("Add", added, own)  # (B, N - r, 1)
    shares = builder.op("Div", matching.one_hot, total)  # (B, N - r, r)
    return builder.op("Add", left, builder.op("MatMul", shares, pull)), total


def unmerge(builder: GraphBuilder, matching: Matching, x: ir.Value) -> ir.Value:
    """Give every original position a copy of the token it went into.

    Args:
        x: tokens after the merge (B, N - r, C), of any type.

    Returns:
        (B, N, C).
    """
    return builder.op("GatherND", x, _places(builder, matching), batch_dims=1)


def token_map(builder: GraphBuilder, matching: Matching) -> ir.Value:
    """Position of each token after the merge, (B, N) int64."""
    return builder.op("Squeeze", _places(builder, matching), builder.ints(2))


def _places(builder: GraphBuilder, matching: Matching) -> ir.Value:
    """The token map as (B, N, 1), which GatherND reads, in 5 nodes.

    ``[kept | merged]`` is a permutation of all positions: sorting inverts it.
    """
    tokens, left = matching.tokens, matching.tokens - matching.removed
    order = builder.op("Concat", matching.kept, matching.merged, axis=1)  # (B, N, 1)
    entries = _sort(builder, order, tokens)[1]  # of each position, its entry in that order
    places = builder.op("Pad", matching.into, builder.ints(0, left, 0, 0, 0, 0))  # (B, N, 1)
    known = np.where(np.arange(tokens) < left, np.arange(tokens), 0)
    places = builder.op("Add", places, _column(builder, f"places_{tokens}_{left}", known))
    return builder.op("GatherND", places, entries, batch_dims=1)


def _sort(builder: GraphBuilder, positions: ir.Value, count: int) -> Sequence[ir.Value]:
    """Positions (B, count, 1) in ascending order, and where each one stood."""
    return builder.ops("TopK", positions, builder.ints(count), outputs=2, axis=1, largest=0)


def _column(builder: GraphBuilder, name: str, numbers: npt.NDArray[np.integer]) -> ir.Value:
    """Whole numbers as (n, 1), int64."""
    return builder.constant(name, numbers.astype(np.int64)[:, None])

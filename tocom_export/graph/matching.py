"""Merging tokens (ToMe) in a graph: which tokens go where, applied and undone.

The same arithmetic as :mod:`tocom_export.training.matching`, in operators that every runtime
has: no scatter (parsers reject it or send it to plugins), no ``-inf`` masks, no sorting but
TopK. Every shape but the batch is static. Tokens and sizes are of the stream; similarities are
float32 in every precision. A merging step, matching included, is 28 nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .builder import FLOAT, GraphBuilder


@dataclass(frozen=True)
class Matching:
    """Which of N tokens go where when r of them are merged, as values of a graph.

    Tokens at odd positions behind the prefix are set B, M of them. After the merge the order is
    ``[prefix, kept A, B]``.
    """

    kept: ir.Value
    """Positions of the prefix and of the A tokens that stay, in order (B, N - M - r, 1), int64."""
    merged: ir.Value
    """Positions of the A tokens that go, the best match first (B, r, 1), int64."""
    into: ir.Value
    """The B token of each, as an index into set B (B, r, 1), int64."""
    one_hot: ir.Value
    """The same in the stream's type, to add tokens by a product (B, M, r)."""
    tokens: int
    """N."""
    removed: int
    """r."""
    prefix: int
    """Protected tokens."""

    @property
    def set_b(self) -> range:
        """Positions of set B."""
        return _set_b(self.tokens, self.prefix)


def match(builder: GraphBuilder, keys: ir.Value, tokens: int, remove: int, prefix: int) -> Matching:
    """Match the ``remove`` most similar pairs of patch tokens.

    Tokens at even positions are set A, at odd ones set B. All N tokens propose to set B, and
    a constant then ranks A's proposals above those of the prefix tokens, and these above set
    B's: one TopK yields ``[merged A | kept A and prefix | ...]`` as positions, with nothing to
    slice away first.

    Args:
        keys: (B, H, N, D), in the type that is computed in.
        tokens: N.
        remove: number of tokens to merge away, r, at most ``(N - prefix) // 2``.
        prefix: number of protected tokens.
    """
    set_b = _set_b(tokens, prefix)
    others = tokens - len(set_b)  # set A and the prefix
    keys = builder.cast(keys, builder.types.compute, FLOAT)
    metric = builder.op("ReduceMean", keys, builder.ints(1), keepdims=0)  # (B, N, D)
    metric = builder.op("Div", metric, builder.op("ReduceL2", metric, builder.ints(2)))
    metric_b = builder.cut(metric, 1, set_b.start, tokens, 2)  # (B, M, D)
    metric_b = builder.op("Transpose", metric_b, perm=(0, 2, 1))
    scores = builder.op("MatMul", metric, metric_b)  # (B, N, M)
    best, into = builder.ops("TopK", scores, builder.ints(1), outputs=2, axis=2)  # (B, N, 1)
    best = builder.op("Add", best, _rank(builder, tokens, prefix))
    _, order = builder.ops("TopK", best, builder.ints(others), outputs=2, axis=1)
    lengths = builder.ints(remove, others - remove)
    merged, kept = builder.ops("Split", order, lengths, outputs=2, axis=1)
    kept = _sort(builder, kept, others - remove)[0]  # back in the original order

    into = builder.op("GatherND", into, merged, batch_dims=1)  # (B, r, 1)
    bits = builder.floats(0.0, 1.0, dtype=FLOAT)  # float32: ONNX Runtime has no OneHot of bfloat16
    one_hot = builder.op("OneHot", into, builder.ints(len(set_b)), bits, axis=1)  # (B, M, r, 1)
    one_hot = builder.op("Squeeze", one_hot, builder.ints(3))
    one_hot = builder.cast(one_hot, FLOAT, builder.types.stream)
    return Matching(kept, merged, into, one_hot, tokens, remove, prefix)


def merge(
    builder: GraphBuilder, matching: Matching, x: ir.Value, size: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Merge tokens into averages weighted by their sizes.

    Args:
        x: tokens (B, N, C).
        size: their sizes (B, N, 1); None before the first merge, when all are 1.

    Returns:
        Tokens (B, N - r, C) and their sizes (B, N - r, 1).
    """
    if size is None:
        weighted = x
        size_b = builder.op("ReduceSum", matching.one_hot, builder.ints(2))
        one = builder.floats(1.0, dtype=builder.types.stream)
        size_b = builder.op("Add", size_b, one)  # (B, M, 1)
        kept = matching.tokens - matching.removed - len(matching.set_b)
        size = builder.op("Pad", size_b, builder.ints(0, kept, 0, 0, 0, 0), one)  # (B, N - r, 1)
    else:
        weighted = builder.op("Mul", x, size)
        size_b = _sum_b(builder, matching, size)
        size_kept = builder.op("GatherND", size, matching.kept, batch_dims=1)
        size = builder.op("Concat", size_kept, size_b, axis=1)  # (B, N - r, 1)
    means = builder.op("Div", _sum_b(builder, matching, weighted), size_b)  # (B, M, C)
    x = builder.op("GatherND", x, matching.kept, batch_dims=1)
    return builder.op("Concat", x, means, axis=1), size  # (B, N - r, C)


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
    """The token map as (B, N, 1), which GatherND reads, in 8 nodes.

    ``[kept | merged]`` holds the positions of all tokens but set B's, whose places are known:
    sorting these alone inverts the permutation. Padding and adding a constant stands in for a
    Concat with one, which would have to be expanded to the batch.
    """
    tokens, removed, set_b = matching.tokens, matching.removed, matching.set_b
    others = tokens - len(set_b)
    start_b = others - removed  # the place where set B begins
    order = builder.op("Concat", matching.kept, matching.merged, axis=1)  # (B, N - M, 1)
    entries = _sort(builder, order, others)[1]  # of each position, its entry in that order

    places = builder.op("Pad", matching.into, builder.ints(0, start_b, 0, 0, 0, 0))
    known = np.minimum(np.arange(others), start_b)
    places = builder.op("Add", places, _column(builder, f"places_{start_b}_{removed}", known))
    places = builder.op("GatherND", places, entries, batch_dims=1)  # (B, N - M, 1)

    places = builder.op("Pad", places, builder.ints(0, 0, 0, 0, len(set_b), 0))
    known = np.pad(start_b + np.arange(len(set_b)), (others, 0))
    name = f"places_{others}_{start_b}_{len(set_b)}"
    places = builder.op("Add", places, _column(builder, name, known))  # (B, N, 1), set B last

    is_b = np.isin(np.arange(tokens), set_b)
    turns = is_b.argsort(kind="stable").argsort()  # of each position, its entry with set B last
    turn = builder.constant(f"turns_{tokens}_{set_b.start}", turns.astype(np.int64))
    return builder.op("Gather", places, turn, axis=1)


def _sum_b(builder: GraphBuilder, matching: Matching, x: ir.Value) -> ir.Value:
    """Each token of set B plus those that go into it: (B, N, C) → (B, M, C)."""
    gone = builder.op("GatherND", x, matching.merged, batch_dims=1)  # (B, r, C)
    added = builder.op("MatMul", matching.one_hot, gone)
    return builder.op("Add", builder.cut(x, 1, matching.set_b.start, matching.tokens, 2), added)


def _sort(builder: GraphBuilder, positions: ir.Value, count: int) -> Sequence[ir.Value]:
    """Positions (B, count, 1) in ascending order, and where each one stood."""
    return builder.ops("TopK", positions, builder.ints(count), outputs=2, axis=1, largest=0)


def _rank(builder: GraphBuilder, tokens: int, prefix: int) -> ir.Value:
    """What is added to cosine similarities (-1..1): set A 0, prefix tokens -4, set B -8."""
    rank = np.zeros((tokens, 1), np.float32)
    rank[_set_b(tokens, prefix)] = -8
    rank[:prefix] = -4
    return builder.constant(f"rank_{tokens}", rank)


def _column(builder: GraphBuilder, name: str, numbers: npt.NDArray[np.integer]) -> ir.Value:
    """Whole numbers as (n, 1), int64."""
    return builder.constant(name, numbers.astype(np.int64)[:, None])


def _set_b(tokens: int, prefix: int) -> range:
    """Odd positions behind the prefix."""
    return range(prefix + 1 - prefix % 2, tokens, 2)

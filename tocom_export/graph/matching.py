"""Removing tokens in a graph: merging (ToMe) and pruning (EViT).

The same arithmetic as :mod:`tocom_export.training.matching`, in operators that every runtime
has: no scatter (parsers reject it or send it to plugins), no ``-inf`` masks, no sorting but
TopK. Every shape but the batch is static. Tokens and sizes are of the stream; what is ranked
is float32 in every precision.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .builder import FLOAT, GraphTape


def merge(
    tape: GraphTape,
    x: ir.Value,
    size: ir.Value | None,
    keys: ir.Value,
    tokens: int,
    remove: int,
    prefix: int,
) -> tuple[ir.Value, ir.Value]:
    """Merge the ``remove`` most similar pairs of patch tokens, in 28 nodes.

    Tokens at even positions are set A, at odd ones set B. All N tokens propose to set B, and
    a constant then ranks A's proposals above those of the prefix tokens, and these above set
    B's: one TopK yields ``[merged A | kept A and prefix | ...]`` as positions in x, with
    nothing to slice away first.

    Args:
        x: tokens (B, N, C).
        size: their sizes (B, N, 1); None before the first merge, when all are 1.
        keys: (B, H, N, D).

    Returns:
        Tokens (B, N - remove, C) in the order ``[prefix, kept A, B]``, and their sizes
        (B, N - remove, 1).
    """
    first_b = prefix + 1 - prefix % 2
    set_b = len(range(first_b, tokens, 2))
    others = tokens - set_b  # set A and the prefix
    keys = tape.cast(keys, tape.types.compute, FLOAT)
    metric = tape.op("ReduceMean", keys, tape.ints(1), keepdims=0)  # (B, N, D)
    metric = tape.op("Div", metric, tape.op("ReduceL2", metric, tape.ints(2)))
    metric_b = tape.op("Transpose", tape.cut(metric, 1, first_b, tokens, 2), perm=(0, 2, 1))
    scores = tape.op("MatMul", metric, metric_b)  # (B, N, set B)
    best, into = tape.ops("TopK", scores, tape.ints(1), outputs=2, axis=2)  # (B, N, 1)
    best = tape.op("Add", best, _rank(tape, tokens, prefix, first_b))
    _, order = tape.ops("TopK", best, tape.ints(others), outputs=2, axis=1)
    merged, kept = tape.ops("Split", order, tape.ints(remove, others - remove), outputs=2, axis=1)
    kept, _ = tape.ops(
        "TopK", kept, tape.ints(others - remove), outputs=2, axis=1, largest=0
    )  # in the original order

    into = tape.op("GatherND", into, merged, batch_dims=1)  # (B, remove, 1)
    stream = tape.types.stream
    bits = tape.floats(0.0, 1.0, dtype=FLOAT)  # float32: ONNX Runtime has no OneHot of bfloat16
    one_hot = tape.op("OneHot", into, tape.ints(set_b), bits, axis=1)
    one_hot = tape.cast(tape.op("Squeeze", one_hot, tape.ints(3)), FLOAT, stream)
    # (B, set B, remove)

    if size is None:
        size_b = tape.op("ReduceSum", one_hot, tape.ints(2))
        one = tape.floats(1.0, dtype=stream)
        size_b = tape.op("Add", size_b, one)
        weighted = x
        pads = tape.ints(0, others - remove, 0, 0, 0, 0)
        size = tape.op("Pad", size_b, pads, one)
    else:
        weighted = tape.op("Mul", x, size)
        added = tape.op("MatMul", one_hot, tape.op("GatherND", size, merged, batch_dims=1))
        size_b = tape.op("Add", tape.cut(size, 1, first_b, tokens, 2), added)  # (B, set B, 1)
        size_kept = tape.op("GatherND", size, kept, batch_dims=1)
        size = tape.op("Concat", size_kept, size_b, axis=1)

    added = tape.op("MatMul", one_hot, tape.op("GatherND", weighted, merged, batch_dims=1))
    sums = tape.op("Add", tape.cut(weighted, 1, first_b, tokens, 2), added)
    means = tape.op("Div", sums, size_b)  # (B, set B, C)
    x = tape.op("Concat", tape.op("GatherND", x, kept, batch_dims=1), means, axis=1)
    return x, size


def prune(
    tape: GraphTape, x: ir.Value, probabilities: ir.Value, tokens: int, remove: int, prefix: int
) -> ir.Value:
    """Drop the ``remove`` patch tokens that the class token attends to least.

    What is left stands in the order of its attention, not of its position: nothing that
    follows depends on the order.

    Args:
        x: tokens (B, N, C).
        probabilities: attention (B, H, N, N).

    Returns:
        Tokens (B, N - remove, C).
    """
    row = tape.cut(probabilities, 2, 0, 1)  # (B, H, 1, N)
    row = tape.cast(tape.cut(row, 3, prefix, tokens), tape.types.compute, FLOAT)
    score = tape.op("ReduceMean", row, tape.ints(1), keepdims=0)  # (B, 1, patches)
    count = tokens - prefix - remove
    _, kept = tape.ops("TopK", score, tape.ints(count), outputs=2, axis=2)
    kept = tape.reshape(kept, -1, count, 1)
    patches = tape.op("GatherND", tape.cut(x, 1, prefix, tokens), kept, batch_dims=1)
    return tape.op("Concat", tape.cut(x, 1, 0, prefix), patches, axis=1)


def _rank(tape: GraphTape, tokens: int, prefix: int, first_b: int) -> ir.Value:
    """What is added to cosine similarities (-1..1): set A 0, prefix tokens -4, set B -8."""
    rank = np.zeros((tokens, 1), np.float32)
    rank[first_b::2] = -8
    rank[:prefix] = -4
    return tape.constant(f"rank_{tokens}", rank)

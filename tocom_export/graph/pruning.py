"""Pruning tokens (EViT) in a graph.

The same arithmetic as :mod:`tocom_export.training.pruning`. Tokens are of the stream; attention
is ranked in float32 in every precision.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .builder import FLOAT, GraphBuilder


def prune(
    builder: GraphBuilder,
    x: ir.Value,
    probabilities: ir.Value,
    tokens: int,
    remove: int,
    prefix: int,
) -> tuple[ir.Value, ir.Value]:
    """Drop the ``remove`` patch tokens that the class token attends to least.

    What is left stands in the order of its attention, not of its position: nothing that
    follows depends on the order. Of equally attended tokens those behind go.

    Args:
        x: tokens (B, N, C).
        probabilities: attention (B, H, N, N).
        tokens: N.
        prefix: number of protected tokens.

    Returns:
        Tokens (B, N - remove, C), and which patches they are (B, N - remove - prefix, 1), int64.
    """
    row = builder.cut(probabilities, 2, 0, 1)  # (B, H, 1, N)
    row = builder.cut(row, 3, prefix, tokens)  # (B, H, 1, patches)
    row = builder.cast(row, builder.types.compute, FLOAT)
    score = builder.op("ReduceMean", row, builder.ints(1), keepdims=0)  # (B, 1, patches)
    # As a column: along the last dimension OpenVINO doesn't take the first of equal ones.
    score = builder.reshape(score, -1, tokens - prefix, 1)
    count = builder.ints(tokens - prefix - remove)
    _, kept = builder.ops("TopK", score, count, outputs=2, axis=1)  # (B, count, 1)
    patches = builder.cut(x, 1, prefix, tokens)
    patches = builder.op("GatherND", patches, kept, batch_dims=1)  # (B, count, C)
    left = builder.op("Concat", builder.cut(x, 1, 0, prefix), patches, axis=1)
    return left, kept


def number_kept(builder: GraphBuilder, kept: ir.Value, left: int, prefix: int) -> ir.Value:
    """Positions of all tokens that are left (B, left, 1), of the patches that were kept."""
    # Padded, and the prefix's positions added, for want of a Concat that expands to the batch.
    kept = builder.op("Pad", kept, builder.ints(0, prefix, 0, 0, 0, 0))
    known = np.full((left, 1), prefix, np.int64)
    known[:prefix, 0] = np.arange(prefix)
    return builder.op("Add", kept, builder.constant(f"numbers_{left}_{prefix}", known))

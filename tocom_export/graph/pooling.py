"""Pooling tokens by their mean, or by what a learned query attends to; merged ones weigh more."""

from __future__ import annotations

import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import GraphBuilder
from .linear import linear
from .mlp import activate
from .norm import normalise


def average(
    builder: GraphBuilder, x: ir.Value, prefix: int, tokens: int, size: ir.Value | None
) -> ir.Value:
    """Mean of the patch tokens (B, N, C) → (B, C), a merged token weighing its size; stream."""
    if prefix:
        x = builder.cut(x, 1, prefix, tokens)
    if size is None:
        return builder.op("ReduceMean", x, builder.ints(1), keepdims=0)
    if prefix:
        size = builder.cut(size, 1, prefix, tokens)
    total = builder.op("ReduceSum", builder.op("Mul", x, size), builder.ints(1), keepdims=0)
    return builder.op("Div", total, builder.op("ReduceSum", size, builder.ints(1), keepdims=0))


def pool_by_attention(
    builder: GraphBuilder, x: ir.Value, spec: VitSpec, tokens: int, size: ir.Value | None
) -> ir.Value:
    """What one learned query attends to (B, N, C) → (B, C), and an MLP behind it (SigLIP); stream.

    A merged token has as much of the attention as those it stands for would have: the logarithm
    of its size is added, whatever the method does within the layers.
    """
    first = spec.pooled_from
    if first:
        x = builder.cut(x, 1, first, tokens)
        size = None if size is None else builder.cut(size, 1, first, tokens)
    count, heads = tokens - first, spec.pool_heads
    width = spec.width // heads
    latent = builder.reshape(builder.weight("attn_pool.latent"), 1, spec.width)
    q = builder.reshape(linear(builder, latent, "attn_pool.q", True), 1, heads, 1, width)
    flat = builder.from_stream(builder.reshape(x, -1, spec.width))
    kv = builder.reshape(linear(builder, flat, "attn_pool.kv", True), -1, count, 2, heads, width)
    kv = builder.op("Transpose", kv, perm=(2, 0, 3, 1, 4))  # (2, B, H, N, D)
    parts = builder.ops("Split", kv, builder.ints(1, 1), outputs=2, axis=0)
    k, v = (builder.op("Squeeze", part, builder.ints(0)) for part in parts)
    q = builder.op("Mul", q, builder.floats(width**-0.5))
    logits = builder.op("MatMul", q, builder.op("Transpose", k, perm=(0, 1, 3, 2)))
    if size is not None:
        bias = builder.from_stream(builder.op("Log", size))
        logits = builder.op("Add", logits, builder.reshape(bias, -1, 1, 1, count))
    pooled = builder.op("MatMul", builder.op("Softmax", logits, axis=-1), v)  # (B, H, 1, D)
    pooled = linear(builder, builder.reshape(pooled, -1, spec.width), "attn_pool.proj", True)
    pooled = builder.to_stream(pooled)
    hidden = builder.from_stream(normalise(builder, pooled, "attn_pool.norm", spec))
    hidden = linear(builder, hidden, "attn_pool.mlp.fc1", True)
    hidden = activate(builder, hidden, spec.pool_activation)
    hidden = linear(builder, hidden, "attn_pool.mlp.fc2", True)
    return builder.op("Add", pooled, builder.to_stream(hidden))

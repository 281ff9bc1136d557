"""From the last layer's tokens to logits: pooling, the final norm, one head or two."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import FLOAT, GraphBuilder
from .linear import linear
from .norm import normalise
from .pooling import average, pool_by_attention


def apply_head(
    builder: GraphBuilder, x: ir.Value, spec: VitSpec, tokens: int, size: ir.Value | None
) -> ir.Value:
    """Tokens (B·N, C) → logits (B, classes); pooled features (B, C) without a head.

    Stream → float32.

    Args:
        tokens: N.
        size: token sizes (B, N, 1), of the stream; None where all are 1.
    """
    with builder.scope("head"):
        x = builder.reshape(x, -1, tokens, spec.width)  # (B, N, C)
        if spec.pool == "token":  # norms are per token: norm only those that are read
            parts = _read_prefix(builder, x, spec)
        else:
            if spec.final_norm == "norm":
                x = normalise(builder, x, "norm", spec)
            parts = [_pool(builder, x, spec, tokens, size)]
        if spec.final_norm == "fc_norm" or (spec.final_norm and spec.pool == "token"):
            parts = [normalise(builder, part, spec.final_norm, spec) for part in parts]
        if spec.classes:
            names = ("head", "head_dist")
            parts = [
                linear(builder, builder.from_stream(part), name, spec.head_bias)
                for part, name in zip(parts, names, strict=False)
            ]  # (B, classes) each
        last = builder.types.compute if spec.classes else builder.types.stream
        parts = [builder.cast(part, last, FLOAT) for part in parts]
        if len(parts) == 1:
            return parts[0]
        return builder.op("Mul", builder.op("Add", *parts), builder.floats(0.5, dtype=FLOAT))


def _pool(
    builder: GraphBuilder, x: ir.Value, spec: VitSpec, tokens: int, size: ir.Value | None
) -> ir.Value:
    """Tokens (B, N, C) → (B, features); stream → stream."""
    if spec.pool == "map":
        return pool_by_attention(builder, x, spec, tokens, size)
    mean = average(builder, x, spec.prefix, tokens, size)
    if spec.pool == "avg":
        return mean
    token = builder.reshape(builder.cut(x, 1, 0, 1), -1, spec.width)
    return builder.op("Concat", token, mean, axis=1)


def _read_prefix(builder: GraphBuilder, x: ir.Value, spec: VitSpec) -> Sequence[ir.Value]:
    """Class token, and distillation token if there is one, of (B, N, C): (B, C) each."""
    read = 2 if spec.distilled else 1
    x = builder.reshape(builder.cut(x, 1, 0, read), -1, read * spec.width)  # (B, read·C)
    if read == 1:
        return [x]
    return builder.ops("Split", x, builder.ints(spec.width, spec.width), outputs=2, axis=1)

"""From the last layer's tokens to what a head reads, and to what one head or two say of it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import FLOAT, GraphBuilder
from .linear import linear
from .norm import normalise
from .pooling import average, pool_by_attention

SHORTEST = 1e-12
"""Of a vector that is divided by its length, as in PyTorch; one of zeros stays that."""


def norm_tokens(
    builder: GraphBuilder, x: ir.Value, spec: VitSpec, tokens: int, every: bool
) -> tuple[ir.Value, bool]:
    """The last layer's tokens (B·N, C) → (B, N, C), and whether they are normed; stream.

    Args:
        tokens: N.
        every: whether each token is to be normed that ever is; else, as norms are per token, only
            where the head reads more of them than the prefix.
    """
    normed = spec.final_norm == "norm" and (every or spec.pool != "token")
    x = builder.reshape(x, -1, tokens, spec.width)
    return (normalise(builder, x, "norm", spec) if normed else x), normed


def read_features(
    builder: GraphBuilder,
    x: ir.Value,
    normed: bool,
    spec: VitSpec,
    tokens: int,
    size: ir.Value | None,
) -> Sequence[ir.Value]:
    """Tokens (B, N, C) → what the head reads (B, features), of two heads one each; stream.

    Args:
        tokens: N.
        size: token sizes (B, N, 1), of the stream; None where all are 1.
    """
    if spec.pool == "token":
        parts = _read_prefix(builder, x, spec)
    else:
        parts = [_pool(builder, x, spec, tokens, size)]
    if spec.final_norm and not normed:
        parts = [normalise(builder, part, spec.final_norm, spec) for part in parts]
    return parts


def apply_heads(builder: GraphBuilder, parts: Sequence[ir.Value], spec: VitSpec) -> ir.Value:
    """What each head reads (B, features), stream → logits, or an embedding (B, rows) float32."""
    names = ("head", "head_dist")
    logits = [
        linear(builder, builder.from_stream(part), name, spec.head_bias)
        for part, name in zip(parts, names, strict=False)
    ]  # (B, rows) each
    return average_parts(builder, logits, builder.types.compute)


def average_parts(builder: GraphBuilder, parts: Sequence[ir.Value], dtype: ir.DataType) -> ir.Value:
    """The mean of one or two (B, F) of a type; that → float32.

    Of what two heads read it is timm's embedding of a distilled model.
    """
    parts = [builder.cast(part, dtype, FLOAT) for part in parts]
    if len(parts) == 1:
        return parts[0]
    return builder.op("Mul", builder.op("Add", *parts), builder.floats(0.5, dtype=FLOAT))


def normalise_length(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    """Vectors (B, F) float32, each divided by its Euclidean length."""
    length = builder.op("ReduceL2", x, builder.ints(1), keepdims=1)
    return builder.op("Div", x, builder.op("Max", length, builder.floats(SHORTEST, dtype=FLOAT)))


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

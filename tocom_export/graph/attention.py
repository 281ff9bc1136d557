"""Multi-head self-attention, in proportion to token size where the method says so."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..compression.method import Method
from ..model.spec import VitSpec
from .builder import GraphBuilder
from .linear import linear
from .norm import head_norm


@dataclass(frozen=True)
class Attended:
    """What attention leaves behind."""

    out: ir.Value
    """(B·N, C)"""
    keys: ir.Value
    """(B, H, N, D)"""
    probabilities: ir.Value
    """(B, H, N, N)"""


def attend(
    builder: GraphBuilder,
    x: ir.Value,
    spec: VitSpec,
    method: Method,
    layer: int,
    tokens: int,
    size: ir.Value | None,
) -> Attended:
    """Attention of normalised tokens (B·N, C); computed → computed.

    Args:
        tokens: N.
        size: token sizes (B, N, 1), of the stream; their logarithm is added to the logits where
            the method is proportional (ToMe, eq. 1).
    """
    name = f"blocks.{layer}.attn"
    heads, width = spec.heads, spec.head_width
    with builder.scope(name):
        qkv = linear(builder, x, f"{name}.qkv", spec.qkv_bias)  # (B·N, 3C)
        qkv = builder.reshape(qkv, -1, tokens, 3, heads, width)
        qkv = builder.op("Transpose", qkv, perm=(2, 0, 3, 1, 4))  # (3, B, H, N, D)
        parts = builder.ops("Split", qkv, builder.ints(1, 1, 1), outputs=3, axis=0)
        q, k, v = (builder.op("Squeeze", part, builder.ints(0)) for part in parts)  # (B, H, N, D)
        if spec.qk_norm:
            q = head_norm(builder, q, f"{name}.q_norm", spec.eps)
            k = head_norm(builder, k, f"{name}.k_norm", spec.eps)
        # The scale goes on q before the product: TensorRT fuses attention only then.
        q = builder.op("Mul", q, builder.floats(width**-0.5))
        logits = builder.op("MatMul", q, builder.op("Transpose", k, perm=(0, 1, 3, 2)))
        if size is not None and method.proportional:
            bias = builder.from_stream(builder.op("Log", size))
            bias = builder.reshape(bias, -1, 1, 1, tokens)
            logits = builder.op("Add", logits, bias)  # (B, H, N, N)
        probabilities = builder.op("Softmax", logits, axis=-1)
        out = builder.op("MatMul", probabilities, v)  # (B, H, N, D)
        out = builder.op("Transpose", out, perm=(0, 2, 1, 3))
        out = builder.reshape(out, -1, spec.width)  # (B·N, C)
        out = linear(builder, out, f"{name}.proj", spec.linear_bias)
    return Attended(out, k, probabilities)

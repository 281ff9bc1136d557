"""Multi-head self-attention, in proportion to token size where the method says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..compression.method import Method
from ..model.spec import VitSpec
from ..model.weight_names import qkv_parts
from .builder import GraphBuilder
from .linear import linear
from .norm import normalise_computed
from .positions import find_bias, find_turn, rotate


@dataclass(frozen=True)
class Attended:
    """What attention leaves behind."""

    out: ir.Value
    """(B·N, C)"""
    keys: ir.Value
    """(B, H, N, D), rotated where the model does so."""
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
    places: ir.Value | None,
) -> Attended:
    """Attention of normalised tokens (B·N, C); computed → computed.

    Args:
        tokens: N.
        size: token sizes (B, N, 1), of the stream; their logarithm is added to the logits where
            the method is proportional (ToMe, eq. 1).
        places: which first token each one is (B, N, 1); None where none has gone yet.
    """
    name = f"blocks.{layer}.attn"
    with builder.scope(name):
        q, k, v = _project(builder, x, spec, layer, tokens)  # (B, H, N, D) each
        if spec.qk_norm:
            q = normalise_computed(builder, q, f"{name}.q_norm", spec)
            k = normalise_computed(builder, k, f"{name}.k_norm", spec)
        if spec.rotary:
            turn = find_turn(builder, spec, layer, tokens, places)
            q, k = rotate(builder, q, turn, spec), rotate(builder, k, turn, spec)
        # The scale goes on q before the product: TensorRT fuses attention only then.
        q = builder.op("Mul", q, builder.floats(spec.head_width**-0.5))
        logits = builder.op("MatMul", q, builder.op("Transpose", k, perm=(0, 1, 3, 2)))
        if spec.relative:
            bias = find_bias(builder, spec, layer, tokens, places)
            logits = builder.op("Add", logits, bias)
        if size is not None and method.proportional:
            bias = builder.from_stream(builder.op("Log", size))
            bias = builder.reshape(bias, -1, 1, 1, tokens)
            logits = builder.op("Add", logits, bias)  # (B, H, N, N)
        probabilities = builder.op("Softmax", logits, axis=-1)
        out = builder.op("MatMul", probabilities, v)  # (B, H, N, D)
        out = builder.op("Transpose", out, perm=(0, 2, 1, 3))
        out = builder.reshape(out, -1, spec.width)  # (B·N, C)
        if spec.attention_norm:
            out = normalise_computed(builder, out, f"{name}.norm", spec)
        out = linear(builder, out, f"{name}.proj", spec.linear_bias)
    return Attended(out, k, probabilities)


def _project(
    builder: GraphBuilder, x: ir.Value, spec: VitSpec, layer: int, tokens: int
) -> Sequence[ir.Value]:
    """Queries, keys and values (B, H, N, D) of tokens (B·N, C)."""
    heads, width = spec.heads, spec.head_width
    names = qkv_parts(spec, layer)
    if len(names) == 3:
        biased = [spec.qkv_bias, spec.qkv_bias and spec.k_bias, spec.qkv_bias]
        parts = [linear(builder, x, *part) for part in zip(names, biased, strict=True)]
        parts = [builder.reshape(part, -1, tokens, heads, width) for part in parts]
        return [builder.op("Transpose", part, perm=(0, 2, 1, 3)) for part in parts]
    bias = None
    if spec.qkv_bias and not spec.k_bias:
        none = builder.constant("no_k_bias", np.zeros(spec.width, builder.types.compute.numpy()))
        first, last = (builder.weight(f"blocks.{layer}.attn.{p}_bias") for p in "qv")
        bias = builder.op("Concat", first, none, last, axis=0)
    biased_qkv = spec.qkv_bias and spec.k_bias
    qkv = linear(builder, x, names[0], biased_qkv, bias)  # (B·N, 3C)
    qkv = builder.reshape(qkv, -1, tokens, 3, heads, width)
    qkv = builder.op("Transpose", qkv, perm=(2, 0, 3, 1, 4))  # (3, B, H, N, D)
    each = builder.ops("Split", qkv, builder.ints(1, 1, 1), outputs=3, axis=0)
    return [builder.op("Squeeze", part, builder.ints(0)) for part in each]

"""LayerNorm, of tokens and of the queries and keys of each head."""

from __future__ import annotations

import onnx_ir as ir

from .builder import GraphBuilder


def layer_norm(builder: GraphBuilder, x: ir.Value, name: str, eps: float) -> ir.Value:
    """LayerNorm over the last axis; stream → stream. Its statistics are float32 in any type."""
    weights = (builder.weight(f"{name}.{part}") for part in ("weight", "bias"))
    scale, bias = map(builder.to_stream, weights)
    return builder.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps)


def head_norm(builder: GraphBuilder, x: ir.Value, name: str, eps: float) -> ir.Value:
    """LayerNorm of queries or keys (B, H, N, D); computed → computed."""
    scale, bias = builder.weight(f"{name}.weight"), builder.weight(f"{name}.bias")
    return builder.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps)

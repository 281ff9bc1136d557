"""The two-layer perceptron, its activations, and AdaptFormer's branch beside it."""

from __future__ import annotations

import math

import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import GraphBuilder
from .linear import linear


def apply_mlp(builder: GraphBuilder, x: ir.Value, spec: VitSpec, layer: int) -> ir.Value:
    """The perceptron on (B·N, C), plus the adapter where the model has one.

    Computed → computed.
    An adapter's scale is part of its ``adapter_up`` weights (AdaptFormer's s, merged).
    """
    name = f"blocks.{layer}.mlp"
    with builder.scope(name):
        hidden = linear(builder, x, f"{name}.fc1", spec.linear_bias)  # (B·N, hidden)
        hidden = activate(builder, hidden, spec)
        out = linear(builder, hidden, f"{name}.fc2", spec.linear_bias)  # (B·N, C)
        if spec.adapter_width:
            hidden = linear(builder, x, f"{name}.adapter_down", True)  # (B·N, adapter)
            hidden = builder.op("Relu", hidden)
            branch = linear(builder, hidden, f"{name}.adapter_up", True)  # (B·N, C)
            out = builder.op("Add", out, branch)
        return out


def activate(builder: GraphBuilder, x: ir.Value, spec: VitSpec) -> ir.Value:
    """The spec's activation; opset 18 has no Gelu, so it is spelt out as runtimes fuse it."""
    if spec.activation == "relu":
        return builder.op("Relu", x)
    if spec.activation == "quick_gelu":
        gate = builder.op("Sigmoid", builder.op("Mul", x, builder.floats(1.702)))
        return builder.op("Mul", x, gate)
    if spec.activation == "gelu":
        inner = builder.op("Erf", builder.op("Div", x, builder.floats(math.sqrt(2))))
    else:
        cube = builder.op("Mul", builder.op("Mul", x, x), x)
        poly = builder.op("Add", x, builder.op("Mul", cube, builder.floats(0.044715)))
        inner = builder.op("Tanh", builder.op("Mul", poly, builder.floats(math.sqrt(2 / math.pi))))
    gate = builder.op("Add", inner, builder.floats(1.0))
    return builder.op("Mul", builder.op("Mul", x, gate), builder.floats(0.5))

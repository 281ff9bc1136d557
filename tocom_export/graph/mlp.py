"""The two-layer perceptron, gated or not, its activations, and AdaptFormer's branch beside it."""

from __future__ import annotations

import math

import onnx_ir as ir

from ..model.spec import Activation, VitSpec
from ..model.weight_names import mlp_inputs
from .builder import GraphBuilder
from .linear import linear
from .norm import normalise_computed


def apply_mlp(builder: GraphBuilder, x: ir.Value, spec: VitSpec, layer: int) -> ir.Value:
    """The perceptron on (B·N, C), plus the adapter where the model has one.

    Computed → computed.
    An adapter's scale is part of its ``adapter_up`` weights (AdaptFormer's s, merged).
    """
    name = f"blocks.{layer}.mlp"
    with builder.scope(name):
        parts = [linear(builder, x, part, spec.linear_bias) for part in mlp_inputs(spec, layer)]
        if spec.mlp == "packed":
            widths = builder.ints(spec.mlp_width, spec.mlp_width)
            parts = list(builder.ops("Split", parts[0], widths, outputs=2, axis=1))
        hidden = activate(builder, parts[0], spec.activation)  # (B·N, hidden)
        if spec.mlp != "plain":  # a gate and what it lets through (SwiGLU)
            hidden = builder.op("Mul", hidden, parts[1])
        if spec.mlp_norm:
            hidden = normalise_computed(builder, hidden, f"{name}.norm", spec)
        out = linear(builder, hidden, f"{name}.fc2", spec.linear_bias)  # (B·N, C)
        if spec.adapter_width:
            hidden = linear(builder, x, f"{name}.adapter_down", True)  # (B·N, adapter)
            hidden = builder.op("Relu", hidden)
            branch = linear(builder, hidden, f"{name}.adapter_up", True)  # (B·N, C)
            out = builder.op("Add", out, branch)
        return out


def activate(builder: GraphBuilder, x: ir.Value, activation: Activation) -> ir.Value:
    """An activation; opset 18 has no Gelu, so it is spelt out as runtimes fuse it."""
    if activation == "relu":
        return builder.op("Relu", x)
    if activation in ("quick_gelu", "silu"):
        inner = builder.op("Mul", x, builder.floats(1.702)) if activation == "quick_gelu" else x
        return builder.op("Mul", x, builder.op("Sigmoid", inner))
    if activation == "gelu":
        inner = builder.op("Erf", builder.op("Div", x, builder.floats(math.sqrt(2))))
    else:
        cube = builder.op("Mul", builder.op("Mul", x, x), x)
        poly = builder.op("Add", x, builder.op("Mul", cube, builder.floats(0.044715)))
        inner = builder.op("Tanh", builder.op("Mul", poly, builder.floats(math.sqrt(2 / math.pi))))
    gate = builder.op("Add", inner, builder.floats(1.0))
    return builder.op("Mul", builder.op("Mul", x, gate), builder.floats(0.5))

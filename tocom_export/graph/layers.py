"""The dense parts of a ViT: embedding, attention, MLP, head.

Tokens travel as ``[batch · tokens, C]``: ``Gemm(transB=1)`` then reads PyTorch's ``[out, in]``
weights as they are, under their own names, and the reshapes cost nothing. Each function says
whether it takes tokens of the *stream* or in the type that is *computed* in
(:class:`~tocom_export.graph.precision.Types`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..compression.method import Method
from ..model.spec import VitSpec
from .builder import FLOAT, GraphTape
from .quantising import scale_name


@dataclass(frozen=True)
class Attended:
    """What attention leaves behind."""

    out: ir.Value
    """(B·N, C)"""
    keys: ir.Value
    """(B, H, N, D)"""
    probabilities: ir.Value
    """(B, H, N, N)"""


def linear(tape: GraphTape, x: ir.Value, name: str, bias: bool) -> ir.Value:
    """``x Wᵀ + b`` on (M, in) → (M, out); computed → computed."""
    weight = tape.weight(f"{name}.weight")
    if name in tape.input_scales:
        x = round_trip(tape, x, name, tape.input_scales[name])
        scale = tape.weight(scale_name(f"{name}.weight"))
        weight = tape.op("DequantizeLinear", weight, scale, axis=0)
    inputs = [x, weight]
    if bias:
        inputs.append(tape.weight(f"{name}.bias"))
    return tape.op("Gemm", *inputs, transB=1)


def round_trip(tape: GraphTape, x: ir.Value, name: str, scale: float) -> ir.Value:
    """x in steps of ``scale``, through int8; a runtime multiplies the int8 numbers."""
    step = tape.constant(f"{name}.input_scale", np.array(scale, np.float32))
    zero = tape.constant("int8_0", np.array(0, np.int8))
    return tape.op("DequantizeLinear", tape.op("QuantizeLinear", x, step, zero), step, zero)


def layer_norm(tape: GraphTape, x: ir.Value, name: str, eps: float) -> ir.Value:
    """LayerNorm over the last axis; stream → stream. Its statistics are float32 in any type."""
    scale, bias = (tape.to_stream(tape.weight(f"{name}.{part}")) for part in ("weight", "bias"))
    return tape.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps)


def head_norm(tape: GraphTape, x: ir.Value, name: str, eps: float) -> ir.Value:
    """LayerNorm of queries or keys (B, H, N, D); computed → computed."""
    scale, bias = tape.weight(f"{name}.weight"), tape.weight(f"{name}.bias")
    return tape.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=eps)


def embed(tape: GraphTape, images: ir.Value, spec: VitSpec) -> ir.Value:
    """Images (B, channels, H, W) → tokens (B·N, C), prefix tokens in front; float32 → stream."""
    with tape.scope("embed"):
        # In the stream's type: opset 18 has no Conv of bfloat16.
        parts = ["weight"] + ["bias"] * spec.patch_bias
        weights = [tape.to_stream(tape.weight(f"patch_embed.proj.{part}")) for part in parts]
        images = tape.cast(images, FLOAT, tape.types.stream)
        patch = spec.patch_size
        x = tape.op("Conv", images, *weights, kernel_shape=patch, strides=patch)
        x = tape.reshape(x, -1, spec.width, spec.patches)
        x = tape.op("Transpose", x, perm=(0, 2, 1))  # (B, patches, C)
        positions = tape.to_stream(tape.weight("pos_embed"))
        if not spec.prefix_positions:
            x = tape.op("Add", x, positions)
        if spec.prefix:
            names = ["cls_token"] * spec.class_token + ["dist_token"] * spec.distilled
            names += ["reg_token"] * bool(spec.registers)
            prefix = tape.weight(names[0])
            if len(names) > 1:
                prefix = tape.op("Concat", *map(tape.weight, names), axis=1)
            prefix = tape.to_stream(prefix)
            batch = tape.op("Shape", images, start=0, end=1)
            shape = tape.op("Concat", batch, tape.ints(spec.prefix, spec.width), axis=0)
            x = tape.op("Concat", tape.op("Expand", prefix, shape), x, axis=1)  # (B, N, C)
        if spec.prefix_positions:
            x = tape.op("Add", x, positions)
        x = tape.reshape(x, -1, spec.width)  # (B·N, C)
        return layer_norm(tape, x, "norm_pre", spec.eps) if spec.pre_norm else x


def attention(
    tape: GraphTape,
    x: ir.Value,
    spec: VitSpec,
    method: Method,
    layer: int,
    tokens: int,
    size: ir.Value | None,
) -> Attended:
    """Multi-head self-attention of normalised tokens (B·N, C); computed → computed.

    Args:
        tokens: N.
        size: token sizes (B, N, 1), of the stream; their logarithm is added to the logits where
            the method is proportional (ToMe, eq. 1).
    """
    name = f"blocks.{layer}.attn"
    heads, width = spec.heads, spec.head_width
    with tape.scope(name):
        qkv = linear(tape, x, f"{name}.qkv", spec.qkv_bias)  # (B·N, 3C)
        qkv = tape.reshape(qkv, -1, tokens, 3, heads, width)
        qkv = tape.op("Transpose", qkv, perm=(2, 0, 3, 1, 4))  # (3, B, H, N, D)
        parts = tape.ops("Split", qkv, tape.ints(1, 1, 1), outputs=3, axis=0)
        q, k, v = (tape.op("Squeeze", part, tape.ints(0)) for part in parts)  # (B, H, N, D)
        if spec.qk_norm:
            q = head_norm(tape, q, f"{name}.q_norm", spec.eps)
            k = head_norm(tape, k, f"{name}.k_norm", spec.eps)
        # The scale goes on q before the product: TensorRT fuses attention only then.
        q = tape.op("Mul", q, tape.floats(width**-0.5))
        logits = tape.op("MatMul", q, tape.op("Transpose", k, perm=(0, 1, 3, 2)))
        if size is not None and method.proportional:
            bias = tape.from_stream(tape.op("Log", size))
            bias = tape.reshape(bias, -1, 1, 1, tokens)
            logits = tape.op("Add", logits, bias)  # (B, H, N, N)
        probabilities = tape.op("Softmax", logits, axis=-1)
        out = tape.op("MatMul", probabilities, v)
        out = tape.op("Transpose", out, perm=(0, 2, 1, 3))
        out = linear(tape, tape.reshape(out, -1, spec.width), f"{name}.proj", spec.linear_bias)
    return Attended(out, k, probabilities)


def mlp(tape: GraphTape, x: ir.Value, spec: VitSpec, layer: int) -> ir.Value:
    """The two-layer perceptron on (B·N, C), plus the adapter where the model has one.

    Computed → computed.
    An adapter's scale is part of its ``adapter_up`` weights (AdaptFormer's s, merged).
    """
    name = f"blocks.{layer}.mlp"
    with tape.scope(name):
        hidden = activation(tape, linear(tape, x, f"{name}.fc1", spec.linear_bias), spec)
        out = linear(tape, hidden, f"{name}.fc2", spec.linear_bias)  # (B·N, C)
        if spec.adapter_width:
            hidden = tape.op("Relu", linear(tape, x, f"{name}.adapter_down", True))
            out = tape.op("Add", out, linear(tape, hidden, f"{name}.adapter_up", True))
        return out


def activation(tape: GraphTape, x: ir.Value, spec: VitSpec) -> ir.Value:
    """The spec's activation; opset 18 has no Gelu, so it is spelt out as runtimes fuse it."""
    if spec.activation == "relu":
        return tape.op("Relu", x)
    if spec.activation == "quick_gelu":
        gate = tape.op("Sigmoid", tape.op("Mul", x, tape.floats(1.702)))
        return tape.op("Mul", x, gate)
    if spec.activation == "gelu":
        inner = tape.op("Erf", tape.op("Div", x, tape.floats(math.sqrt(2))))
    else:
        cube = tape.op("Mul", tape.op("Mul", x, x), x)
        poly = tape.op("Add", x, tape.op("Mul", cube, tape.floats(0.044715)))
        inner = tape.op("Tanh", tape.op("Mul", poly, tape.floats(math.sqrt(2 / math.pi))))
    gate = tape.op("Add", inner, tape.floats(1.0))
    return tape.op("Mul", tape.op("Mul", x, gate), tape.floats(0.5))


def residual(
    tape: GraphTape, x: ir.Value, branch: ir.Value, spec: VitSpec, layer: int, which: int
) -> ir.Value:
    """``x + branch``, the branch scaled where the model has LayerScale.

    Stream and computed → stream.
    """
    with tape.scope(f"blocks.{layer}.residual{which}"):
        if spec.layer_scale:
            branch = tape.op("Mul", branch, tape.weight(f"blocks.{layer}.ls{which}.gamma"))
        return tape.op("Add", x, tape.to_stream(branch))


def head(
    tape: GraphTape, x: ir.Value, spec: VitSpec, tokens: int, size: ir.Value | None
) -> ir.Value:
    """Tokens (B·N, C) → logits (B, classes); pooled features (B, C) without a head.

    Stream → float32.
    """
    with tape.scope("head"):
        x = tape.reshape(x, -1, tokens, spec.width)
        if spec.pool == "token":  # LayerNorm is per token: norm only those that are read
            read = 2 if spec.distilled else 1
            x = tape.reshape(tape.cut(x, 1, 0, read), -1, read * spec.width)
            parts = (
                [x]
                if read == 1
                else tape.ops("Split", x, tape.ints(spec.width, spec.width), outputs=2, axis=1)
            )
        else:
            if spec.final_norm == "norm":
                x = layer_norm(tape, x, "norm", spec.eps)
            parts = [average(tape, x, spec.prefix, tokens, size)]
        if spec.final_norm == "fc_norm" or (spec.final_norm and spec.pool == "token"):
            parts = [layer_norm(tape, part, spec.final_norm, spec.eps) for part in parts]
        if spec.classes:
            names = ("head", "head_dist")
            parts = [
                linear(tape, tape.from_stream(p), n, True)
                for p, n in zip(parts, names, strict=False)
            ]
        last = tape.types.compute if spec.classes else tape.types.stream
        parts = [tape.cast(part, last, FLOAT) for part in parts]
        if len(parts) == 1:
            return parts[0]
        return tape.op("Mul", tape.op("Add", *parts), tape.floats(0.5, dtype=FLOAT))


def average(
    tape: GraphTape, x: ir.Value, prefix: int, tokens: int, size: ir.Value | None
) -> ir.Value:
    """Mean of the patch tokens (B, N, C) → (B, C), a merged token weighing its size; stream."""
    if prefix:
        x = tape.cut(x, 1, prefix, tokens)
    if size is None:
        return tape.op("ReduceMean", x, tape.ints(1), keepdims=0)
    if prefix:
        size = tape.cut(size, 1, prefix, tokens)
    total = tape.op("ReduceSum", tape.op("Mul", x, size), tape.ints(1), keepdims=0)
    return tape.op("Div", total, tape.op("ReduceSum", size, tape.ints(1), keepdims=0))

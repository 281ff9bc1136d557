"""Linear layers on PyTorch's own weights, in floating point or int8.

Tokens travel as ``[batch · tokens, C]``: ``Gemm(transB=1)`` then reads PyTorch's ``[out, in]``
weights as they are, under their own names, and the reshapes cost nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .builder import FLOAT, GraphBuilder
from .quantising import scale_name


def linear(
    builder: GraphBuilder, x: ir.Value, name: str, biased: bool, bias: ir.Value | None = None
) -> ir.Value:
    """``x Wᵀ + b`` on (M, in) → (M, out); computed → computed.

    Args:
        biased: whether the layer has a bias of its own.
        bias: another (out,) in its place.
    """
    bias = builder.weight(f"{name}.bias") if biased else bias
    weight = builder.weight(f"{name}.weight")
    if builder.is_quantized(f"{name}.weight"):
        if name in builder.input_scales:
            return _linear_int8(builder, x, name, bias)
        return _linear_dynamic(builder, x, name, bias)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return builder.op("Gemm", *inputs, transB=1)


def _linear_int8(builder: GraphBuilder, x: ir.Value, name: str, bias: ir.Value | None) -> ir.Value:
    """The same through int8, in the one form that every runtime multiplies in int8.

    ONNX Runtime wants a zero point with the weight, one a row, and no float bias in the Gemm;
    NVIDIA's parser refuses an int32 bias. So the bias is added by itself.
    """
    x = round_trip(builder, x, name, builder.input_scales[name])
    weight = builder.weight(f"{name}.weight")
    scale = builder.weight(scale_name(f"{name}.weight"))
    rows = builder.shape(f"{name}.weight")[0]
    zeros = builder.constant(f"int8_zeros_{rows}", np.zeros(rows, np.int8))
    weight = builder.op("DequantizeLinear", weight, scale, zeros, axis=0)
    out = builder.op("Gemm", x, weight, transB=1)
    return out if bias is None else builder.op("Add", out, bias)


def _linear_dynamic(
    builder: GraphBuilder, x: ir.Value, name: str, bias: ir.Value | None
) -> ir.Value:
    """The same with the input's range found at each run, in the form that ONNX Runtime fuses."""
    quantized, step, zero = builder.ops("DynamicQuantizeLinear", x, outputs=3)
    weight = builder.op("Transpose", builder.weight(f"{name}.weight"), perm=(1, 0))
    out = builder.op("MatMulInteger", quantized, weight, zero)
    scale = builder.op("Mul", step, builder.weight(scale_name(f"{name}.weight")))
    out = builder.op("Mul", builder.op("Cast", out, to=int(FLOAT)), scale)
    return out if bias is None else builder.op("Add", out, bias)


def round_trip(builder: GraphBuilder, x: ir.Value, name: str, scale: float) -> ir.Value:
    """x in steps of ``scale``, through int8; a runtime multiplies the int8 numbers."""
    step = builder.constant(f"{name}.input_scale", np.array(scale, np.float32))
    zero = builder.constant("int8_0", np.array(0, np.int8))
    quantized = builder.op("QuantizeLinear", x, step, zero)
    return builder.op("DequantizeLinear", quantized, step, zero)

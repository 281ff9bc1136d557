"""LayerNorm and RMSNorm, of tokens and of the queries and keys of each head."""

from __future__ import annotations

import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import FLOAT, GraphBuilder


def normalise(builder: GraphBuilder, x: ir.Value, name: str, spec: VitSpec) -> ir.Value:
    """The spec's norm over the last axis of tokens; stream → stream."""
    return _apply(builder, x, name, spec, builder.types.stream)


def normalise_computed(builder: GraphBuilder, x: ir.Value, name: str, spec: VitSpec) -> ir.Value:
    """The same within a branch: of queries, keys, hidden values; computed → computed."""
    return _apply(builder, x, name, spec, builder.types.compute)


def _apply(
    builder: GraphBuilder, x: ir.Value, name: str, spec: VitSpec, dtype: ir.DataType
) -> ir.Value:
    """Statistics are float32 in any type."""
    compute = builder.types.compute
    scale = builder.cast(builder.weight(f"{name}.weight"), compute, dtype)
    if spec.norms == "layer":
        bias = builder.cast(builder.weight(f"{name}.bias"), compute, dtype)
        return builder.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=spec.eps)
    # Opset 18 has no RMSNormalization.
    wide = builder.cast(x, dtype, FLOAT)
    square = builder.op("Mul", wide, wide)
    mean = builder.op("ReduceMean", square, builder.ints(-1))
    root = builder.op("Sqrt", builder.op("Add", mean, builder.floats(spec.eps, dtype=FLOAT)))
    return builder.op("Mul", builder.cast(builder.op("Div", wide, root), FLOAT, dtype), scale)

"""Which tensors of a graph are stored and computed in which type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class Types:
    """The types of one precision; docs/precision.md has the measurements behind the choice.

    Whatever the precision, images and logits are float32, a kernel's own sums (LayerNorm's
    statistics, softmax, the products' accumulators) are float32, and so is the similarity
    by which tokens are matched or ranked: near 1 a half can't tell cosines apart.
    """

    compute: ir.DataType
    """Of the weights, the products' inputs and outputs, and the attention."""
    stream: ir.DataType
    """Of what runs from layer to layer: patch embedding, residual stream, sizes, merged tokens."""


TYPES: dict[Precision, Types] = {
    "fp32": Types(ir.DataType.FLOAT, ir.DataType.FLOAT),
    "fp16": Types(ir.DataType.FLOAT16, ir.DataType.FLOAT16),
    "bf16": Types(ir.DataType.BFLOAT16, ir.DataType.FLOAT),
    "int8": Types(ir.DataType.FLOAT, ir.DataType.FLOAT),
}

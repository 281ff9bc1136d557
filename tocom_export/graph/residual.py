"""The sum of the residual stream and what a layer's branch adds to it."""

from __future__ import annotations

import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import GraphBuilder


def add_residual(
    builder: GraphBuilder, x: ir.Value, branch: ir.Value, spec: VitSpec, layer: int, which: int
) -> ir.Value:
    """``x + branch``, the branch scaled where the model has LayerScale.

    Stream and computed → stream.

    Args:
        x: (B·N, C).
        branch: (B·N, C).
        which: 1 after attention, 2 after the MLP.
    """
    with builder.scope(f"blocks.{layer}.residual{which}"):
        if spec.layer_scale:
            branch = builder.op("Mul", branch, builder.weight(f"blocks.{layer}.ls{which}.gamma"))
        return builder.op("Add", x, builder.to_stream(branch))

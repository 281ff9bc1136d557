"""The sum of the residual stream and what a layer's branch adds to it."""

from __future__ import annotations

import onnx_ir as ir

from ..model.spec import VitSpec
from ..model.weight_names import layer_scale_name
from .builder import GraphBuilder
from .norm import normalise


def add_residual(
    builder: GraphBuilder, x: ir.Value, branch: ir.Value, spec: VitSpec, layer: int, which: int
) -> ir.Value:
    """``x + branch``, the branch scaled (LayerScale) or normed where the model does so.

    Stream and computed → stream.

    Args:
        x: (B·N, C).
        branch: (B·N, C).
        which: 1 after attention, 2 after the MLP.
    """
    branch = finish_branch(builder, branch, spec, layer, which)
    with builder.scope(f"blocks.{layer}.residual{which}"):
        return builder.op("Add", x, branch)


def finish_branch(
    builder: GraphBuilder, branch: ir.Value, spec: VitSpec, layer: int, which: int
) -> ir.Value:
    """A branch (B·N, C) as it is added: scaled or normed where the model does so.

    Computed → stream.
    """
    with builder.scope(f"blocks.{layer}.residual{which}"):
        if which in spec.scaled:
            scale = builder.weight(layer_scale_name(spec, layer, which))
            branch = builder.op("Mul", branch, scale)
        branch = builder.to_stream(branch)
        if spec.post_norm:
            branch = normalise(builder, branch, f"blocks.{layer}.norm{which}", spec)
        return branch

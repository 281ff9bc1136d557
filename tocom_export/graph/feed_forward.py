"""A layer's MLP with its norm and its residual: of all tokens, or of fewer, given back to all."""

from __future__ import annotations

import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import GraphBuilder
from .matching import Matching, merge, unmerge
from .mlp import apply_mlp
from .norm import normalise
from .residual import add_residual, finish_branch


def feed_forward(builder: GraphBuilder, x: ir.Value, spec: VitSpec, layer: int) -> ir.Value:
    """Tokens (B·N, C) and what the MLP adds to them; stream → stream."""
    return add_residual(builder, x, _apply(builder, x, spec, layer), spec, layer, 2)


def feed_merged(
    builder: GraphBuilder, x: ir.Value, spec: VitSpec, layer: int, matching: Matching
) -> ir.Value:
    """Tokens (B·N, C) and what the MLP adds to them, which sees only N - r; stream → stream.

    Tokens are merged before it, as means: all begin the layer with a size of one. What it gives is
    unmerged and added to all (Token Compensator, appendix, dense prediction).
    """
    name, left = f"blocks.{layer}", matching.tokens - matching.removed
    with builder.scope(f"{name}.tome"):
        merged = builder.reshape(x, -1, matching.tokens, spec.width)
        merged, _ = merge(builder, matching, merged, None)  # (B, N - r, C)
        merged = builder.reshape(merged, -1, spec.width)
    branch = _apply(builder, merged, spec, layer)
    branch = finish_branch(builder, branch, spec, layer, 2)  # (B·(N - r), C)
    with builder.scope(f"{name}.unmerge"):
        branch = builder.reshape(branch, -1, left, spec.width)
        branch = builder.reshape(unmerge(builder, matching, branch), -1, spec.width)
    with builder.scope(f"{name}.residual2"):
        return builder.op("Add", x, branch)


def _apply(builder: GraphBuilder, x: ir.Value, spec: VitSpec, layer: int) -> ir.Value:
    """The MLP of tokens (B·N, C), normed before it or not; stream → computed."""
    name = f"blocks.{layer}"
    with builder.scope(name):
        normed = x if spec.post_norm else normalise(builder, x, f"{name}.norm2", spec)
        normed = builder.from_stream(normed)
    return apply_mlp(builder, normed, spec, layer)

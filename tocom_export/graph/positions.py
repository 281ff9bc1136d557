"""Positions that attention reads itself: rotary ones, and biases by relative position.

A token keeps its position while others are merged into it or dropped around it: what is carried
from layer to layer is which of the first tokens each one was. Tables are gathered by that, so they
are the model's own numbers in every precision (docs/positions.md has what else was measured).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..model.relative import log_distances, number_pairs
from ..model.spec import VitSpec
from ..model.weight_names import relative_name
from .builder import FLOAT, GraphBuilder
from .linear import linear


@dataclass(frozen=True)
class Turn:
    """By what queries and keys are rotated, cosines and sines (1 or B, 1 or H, N, D/2)."""

    cos: ir.Value
    sin: ir.Value


def keep_places(builder: GraphBuilder, places: ir.Value | None, kept: ir.Value) -> ir.Value:
    """Which first token each of the tokens that are left was (B, N - r, 1), int64.

    Args:
        places: the same before (B, N, 1); None where none has gone yet.
        kept: positions of those that stay (B, N - r, 1).
    """
    return kept if places is None else builder.op("GatherND", places, kept, batch_dims=1)


def find_turn(
    builder: GraphBuilder, spec: VitSpec, layer: int, tokens: int, places: ir.Value | None
) -> Turn:
    """The rotation of a layer's N tokens; computed."""
    assert spec.rotary
    positions = np.zeros((spec.tokens, 2), np.float32)  # prefix tokens lie at the origin
    positions[spec.prefix :] = spec.rotary.positions(spec.grid)
    if spec.rotary.kind == "mixed":
        weights = builder.cast(builder.weight("rope.freqs"), builder.types.compute, FLOAT)
        each = builder.op("Gather", weights, builder.ints(layer), axis=1)  # (2, 1, H, D/2)
        each = builder.op("Transpose", each, perm=(1, 2, 0, 3))  # (1, H, 2, D/2)
        table = builder.constant("rotary_positions", positions)
        angles = builder.op("MatMul", table, each)  # (1, H, N0, D/2)
        tables = [builder.op("Cos", angles), builder.op("Sin", angles)]
        tables = [builder.cast(t, FLOAT, builder.types.compute) for t in tables]
        if places is not None:
            tables = [builder.op("Squeeze", t, builder.ints(0)) for t in tables]
            tables = [_gather(builder, t, places, tokens, axis=1) for t in tables]  # (H, B, N, D/2)
            tables = [builder.op("Transpose", t, perm=(1, 0, 2, 3)) for t in tables]
        return Turn(*tables)
    wide = positions @ spec.rotary.frequencies(spec.head_width)  # (N0, D/2)
    dtype = builder.types.compute.numpy()
    constants = {"cos": np.cos(wide).astype(dtype), "sin": np.sin(wide).astype(dtype)}
    found = [builder.constant(f"rotary_{name}", table) for name, table in constants.items()]
    if places is not None:
        found = [_gather(builder, t, places, tokens, axis=0) for t in found]  # (B, N, D/2)
        found = [builder.reshape(t, -1, 1, tokens, spec.head_width // 2) for t in found]
    return Turn(*found)


def rotate(builder: GraphBuilder, x: ir.Value, turn: Turn, spec: VitSpec) -> ir.Value:
    """Queries or keys (B, H, N, D) rotated, pair by pair.

    What is rotated comes out with the second of all pairs in front: an order of channels that
    queries and keys share changes no product of theirs.
    """
    assert spec.rotary
    width = spec.head_width
    if spec.rotary.half:
        first, second = (builder.cut(x, 3, at, at + width // 2) for at in (0, width // 2))
    else:
        first, second = (builder.cut(x, 3, at, width, 2) for at in (0, 1))
    real = builder.op(
        "Sub", builder.op("Mul", first, turn.cos), builder.op("Mul", second, turn.sin)
    )
    imaginary = builder.op(
        "Add", builder.op("Mul", second, turn.cos), builder.op("Mul", first, turn.sin)
    )
    # The other way round OpenVINO (2026.4) makes it one operation of its own, RoPE, of which it
    # loses a part when it exports a compiled model: opened again, that gives other logits.
    return builder.op("Concat", imaginary, real, axis=3)


def find_bias(
    builder: GraphBuilder, spec: VitSpec, layer: int, tokens: int, places: ir.Value | None
) -> ir.Value:
    """What attention gains by relative position (1 or B, H, N, N); computed."""
    pairs = builder.constant("relative_pairs", number_pairs(spec))  # (N0, N0)
    table = _read_table(builder, spec, layer)  # (pairs, H)
    if places is None:
        bias = builder.op("Gather", table, pairs, axis=0)  # (N, N, H)
        bias = builder.op("Transpose", bias, perm=(2, 0, 1))
        return builder.op("Unsqueeze", bias, builder.ints(0))
    rows = builder.op("Mul", places, builder.ints(spec.tokens))  # (B, N, 1)
    flat = builder.op("Add", rows, builder.reshape(places, -1, 1, tokens))  # (B, N, N)
    chosen = builder.op("Gather", builder.reshape(pairs, -1), flat, axis=0)
    bias = builder.op("Gather", table, chosen, axis=0)  # (B, N, N, H)
    return builder.op("Transpose", bias, perm=(0, 3, 1, 2))


def _read_table(builder: GraphBuilder, spec: VitSpec, layer: int) -> ir.Value:
    """The bias of each relative position (pairs, H); those with a prefix token behind the rest."""
    name = relative_name(spec, layer)
    if spec.relative == "table":
        return builder.weight(f"{name}.relative_position_bias_table")
    distances = log_distances(spec.grid).astype(builder.types.compute.numpy())  # (pairs, 2)
    hidden = builder.constant("relative_distances", distances)
    hidden = builder.op("Relu", linear(builder, hidden, f"{name}.mlp.fc1", True))
    table = linear(builder, hidden, f"{name}.mlp.fc2", True)
    if not spec.prefix:
        return table
    none = np.zeros((3, spec.heads), builder.types.compute.numpy())
    return builder.op("Concat", table, builder.constant("relative_none", none), axis=0)


def _gather(
    builder: GraphBuilder, table: ir.Value, places: ir.Value, tokens: int, axis: int
) -> ir.Value:
    """Rows of a table for tokens (B, N, 1), which take the place of ``axis``."""
    return builder.op("Gather", table, builder.reshape(places, -1, tokens), axis=axis)

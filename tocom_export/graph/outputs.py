"""What a graph gives of its last layer: each output under its own name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from ..model.outputs import DENSE, OutputName, list_forms
from ..model.spec import VitSpec
from .builder import FLOAT, GraphBuilder
from .head import apply_heads, average_parts, norm_tokens, normalise_length, read_features
from .tracking import Tracker

_TYPES = {"float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32}


@dataclass(frozen=True)
class LastLayer:
    """What the layers leave."""

    x: ir.Value
    """Tokens (B·N, C), of the stream."""
    tokens: int
    """N."""
    size: ir.Value | None
    """Token sizes (B, N, 1), of the stream; None where all are 1."""
    tracker: Tracker | None = None
    """Where the patches went, for outputs that have something of each."""


def add_outputs(
    builder: GraphBuilder,
    last: LastLayer,
    spec: VitSpec,
    names: Iterable[OutputName],
    unit_embedding: bool,
) -> list[ir.Value]:
    """The values that a graph ends with, in the order of their names; pooled once for all."""
    names = tuple(names)
    with builder.scope("head"):
        x, normed = norm_tokens(builder, last.x, spec, last.tokens, "tokens" in names)
        if {*names} - {*DENSE}:
            parts = read_features(builder, x, normed, spec, last.tokens, last.size)

    def give(name: str) -> ir.Value:
        if name in DENSE:
            assert last.tracker is not None
            with builder.scope(name):
                if name == "map":
                    return last.tracker.map()
                return last.tracker.spread(builder.cast(x, builder.types.stream, FLOAT))
        headed = name == "logits" or bool(spec.projection)
        with builder.scope("head" if headed else "embedding"):
            if headed:
                made = apply_heads(builder, parts, spec)
            else:
                made = average_parts(builder, parts, builder.types.stream)
            unit = unit_embedding and name == "embedding"
            return normalise_length(builder, made) if unit else made

    values = []
    for name, form in list_forms(spec, names).items():
        value = give(name)
        value.name = name
        value.type = ir.TensorType(_TYPES[form.dtype])
        value.shape = ir.Shape(["batch", *form.shape])
        values.append(value)
    return values

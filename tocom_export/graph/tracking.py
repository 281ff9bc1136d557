"""Where the patches of an image go: followed through merging and pruning, for pictures of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import FLOAT, GraphBuilder
from .matching import Matching, token_map

GONE = -1
"""The place of a token that was pruned."""


class Tracker:
    """Follows every token of the first layer, and notes after each layer where it is.

    Args:
        images: the graph's input, whose first dimension is the batch.
    """

    def __init__(self, builder: GraphBuilder, spec: VitSpec, images: ir.Value) -> None:
        self._builder, self._spec = builder, spec
        batch = builder.op("Shape", images, start=0, end=1)
        shape = builder.op("Concat", batch, builder.ints(spec.tokens), axis=0)
        first = builder.constant("first_places", np.arange(spec.tokens, dtype=np.int64)[None])
        self._places = builder.op("Expand", first, shape)  # (B, N0), int64
        self._maps: list[ir.Value] = []

    def follow_merge(self, matching: Matching) -> None:
        """Go on to where a merge puts each token."""
        self._places = self._compose(token_map(self._builder, matching))

    def follow_prune(self, kept: ir.Value, tokens: int) -> None:
        """Go on to where pruning puts each token, or drops it.

        Args:
            kept: positions of all tokens that are left, in their new order (B, N - r, 1), int64.
            tokens: N.
        """
        builder = self._builder
        positions = builder.constant(f"positions_{tokens}", np.arange(tokens, dtype=np.int64)[None])
        found = builder.op("Cast", builder.op("Equal", kept, positions), to=int(FLOAT))
        place = builder.op("ArgMax", found, axis=1, keepdims=0)  # (B, N - r, N) → (B, N)
        left = builder.op("ReduceSum", found, builder.ints(1), keepdims=0)
        left = builder.op("Cast", left, to=int(ir.DataType.BOOL))
        step = builder.op("Where", left, place, builder.ints(GONE))
        gone = builder.op("Less", self._places, builder.ints(0))
        self._places = builder.op("Where", gone, builder.ints(GONE), self._compose(step))

    def note_layer(self) -> None:
        """Note where each patch is now."""
        builder, spec = self._builder, self._spec
        patches = builder.cut(self._places, 1, spec.prefix, spec.tokens)  # (B, patches)
        if spec.prefix:  # counted from the first patch token that is left
            patches = builder.op("Sub", patches, builder.ints(spec.prefix))
            patches = builder.op("Max", patches, builder.ints(GONE))
        patches = builder.op("Unsqueeze", patches, builder.ints(1))
        self._maps.append(builder.op("Cast", patches, to=int(ir.DataType.INT32)))

    def finish(self) -> ir.Value:
        """All that was noted (B, layers, patches), int32."""
        maps = self._builder.op("Concat", *self._maps, axis=1)
        maps.name, maps.type = "maps", ir.TensorType(ir.DataType.INT32)
        maps.shape = ir.Shape(["batch", len(self._maps), self._spec.patches])
        return maps

    def _compose(self, step: ir.Value) -> ir.Value:
        """The places one step further (B, N0), by that step (B, N); behind -1 is the last one."""
        deep = self._builder.op("Unsqueeze", self._places, self._builder.ints(2))  # (B, N0, 1)
        return self._builder.op("GatherND", step, deep, batch_dims=1)

"""Where the patches of an image go: followed through merging and pruning."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import FLOAT, GraphBuilder
from .matching import Matching, token_map

GONE = -1
"""The place of a token that was pruned."""


class Tracker:
    """Follows every token of the first layer; may note after each layer where it is.

    Args:
        images: the graph's input, whose first dimension is the batch.
    """

    def __init__(self, builder: GraphBuilder, spec: VitSpec, images: ir.Value) -> None:
        self._builder, self._spec, self._images = builder, spec, images
        self._places: ir.Value | None = None
        """Of each first token (B, N0), int64; None while all are where they were."""
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
        before, now = self._places, self._compose(step)
        if before is not None:
            gone = builder.op("Less", before, builder.ints(0))
            now = builder.op("Where", gone, builder.ints(GONE), now)
        self._places = now

    def map(self) -> ir.Value:
        """Where each patch is now (B, patches), int32, counted from the first patch token."""
        builder, spec = self._builder, self._spec
        patches = self._cut_patches(self._find_places())
        if spec.prefix:
            patches = builder.op("Sub", patches, builder.ints(spec.prefix))
            patches = builder.op("Max", patches, builder.ints(GONE))
        return builder.op("Cast", patches, to=int(ir.DataType.INT32))

    def spread(self, x: ir.Value) -> ir.Value:
        """Give every patch the token that it went into: (B, N, C), of any type → (B, patches, C).

        It undoes all merges at once. No token may have been pruned.
        """
        if self._places is None:
            return self._cut_patches(x)
        places = self._builder.op(
            "Unsqueeze", self._cut_patches(self._places), self._builder.ints(2)
        )
        return self._builder.op("GatherND", x, places, batch_dims=1)

    def note_layer(self) -> None:
        """Note where each patch is now."""
        self._maps.append(self._builder.op("Unsqueeze", self.map(), self._builder.ints(1)))

    def finish(self) -> ir.Value:
        """All that was noted (B, layers, patches), int32."""
        maps = self._builder.op("Concat", *self._maps, axis=1)
        maps.name, maps.type = "maps", ir.TensorType(ir.DataType.INT32)
        maps.shape = ir.Shape(["batch", len(self._maps), self._spec.patches])
        return maps

    def _find_places(self) -> ir.Value:
        """Of each first token (B, N0), int64."""
        if self._places is not None:
            return self._places
        builder, tokens = self._builder, self._spec.tokens
        batch = builder.op("Shape", self._images, start=0, end=1)
        shape = builder.op("Concat", batch, builder.ints(tokens), axis=0)
        first = builder.constant("first_places", np.arange(tokens, dtype=np.int64)[None])
        return builder.op("Expand", first, shape)

    def _cut_patches(self, x: ir.Value) -> ir.Value:
        """What stands behind the prefix of (B, N0, ...)."""
        spec = self._spec
        return self._builder.cut(x, 1, spec.prefix, spec.tokens) if spec.prefix else x

    def _compose(self, step: ir.Value) -> ir.Value:
        """The places one step further (B, N0), by that step (B, N); behind -1 is the last one."""
        if self._places is None:
            return step
        deep = self._builder.op("Unsqueeze", self._places, self._builder.ints(2))  # (B, N0, 1)
        return self._builder.op("GatherND", step, deep, batch_dims=1)

"""VitSpec + schedule + method → an ONNX model whose weights lie in safetensors files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from ..compression.method import Method
from ..compression.schedule import Schedule
from ..errors import UnsupportedModelError
from ..io.tensors import StoredTensor
from ..model.outputs import DENSE, OutputName, check_method, choose_outputs
from ..model.spec import VitSpec
from .attention import attend
from .builder import FLOAT, GraphBuilder
from .embedding import embed
from .feed_forward import feed_forward, feed_merged
from .matching import match, merge
from .norm import normalise
from .outputs import LastLayer, add_outputs
from .positions import keep_places
from .precision import TYPES, Types
from .pruning import number_kept, prune
from .residual import add_residual
from .tracking import Tracker

OPSET = 18
IR_VERSION = 8  # the one that came with opset 18's generation; runtimes of 2023 read it


def write_graph(
    spec: VitSpec,
    schedule: Schedule,
    method: Method,
    weights: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    types: Types = TYPES["fp32"],
    input_scales: Mapping[str, float] | None = None,
    outputs: Iterable[OutputName] = (),
    unit_embedding: bool = False,
    trace: bool = False,
) -> ir.Model:
    """The graph of one model at one schedule.

    Input ``images`` (B, channels, height, width), normalised; outputs ``logits`` (B, classes),
    ``embedding`` (B, features), what the head reads, and ``tokens`` (B, patches, C), all of them
    float32 in every precision, and ``map`` (B, patches) int32. B is free, every other dimension
    fixed.

    Args:
        weights: PyTorch name → where the tensor lies; files are named relative to the graph.
        metadata: becomes the model's ``metadata_props``.
        types: what is computed in which type.
        input_scales: quantized layer → what one step of its int8 input stands for. Layers are
            quantized whose weights are stored in int8, with scales beside them; without a step
            of their own they find the range of their inputs at each run.
        outputs: in their order; default: as :func:`choose_outputs` says.
        unit_embedding: divide each embedding by its length.
        trace: also give ``maps`` (B, layers, patches) int32: which patch token that is left after
            a layer each patch of the image is part of, counted from 0; -1 where it was pruned.

    Raises:
        InputError: the model, or the method, has no such output.
        UnsupportedModelError: EViT of a model without a class token.
    """
    if method.name == "evit" and not spec.class_token:
        raise UnsupportedModelError(spec.model, "EViT without a class token")
    names = choose_outputs(spec, outputs)
    check_method(names, method)
    builder = GraphBuilder(weights, types, input_scales)
    images = ir.val("images", FLOAT, ("batch", spec.channels, *spec.image_size))
    tracker = Tracker(builder, spec, images) if trace or {*names} & {*DENSE} else None
    x = embed(builder, images, spec)  # (B·N, C)
    last = _apply_layers(builder, x, spec, schedule, method, tracker, trace)
    given = add_outputs(builder, last, spec, names, unit_embedding)
    graph = ir.Graph(
        [images],
        [*given, tracker.finish()] if tracker and trace else given,
        nodes=builder.nodes,
        initializers=builder.initializers,
        opset_imports={"": OPSET},
        name=spec.model,
    )
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="tocom-export",
        metadata_props=dict(metadata),
    )


def _apply_layers(
    builder: GraphBuilder,
    x: ir.Value,
    spec: VitSpec,
    schedule: Schedule,
    method: Method,
    tracker: Tracker | None,
    trace: bool,
) -> LastLayer:
    """Embedded tokens (B·N, C) → those that all layers leave, stream → stream."""
    size: ir.Value | None = None
    places: ir.Value | None = None
    tokens = spec.tokens
    for layer, remove in enumerate(schedule.removed):
        name = f"blocks.{layer}"
        with builder.scope(name):
            normed = x if spec.post_norm else normalise(builder, x, f"{name}.norm1", spec)
            normed = builder.from_stream(normed)
        attended = attend(builder, normed, spec, method, layer, tokens, size, places)
        x = add_residual(builder, x, attended.out, spec, layer, 1)
        whole = method.merge == "ffn"
        if remove and whole:
            with builder.scope(f"{name}.tome"):
                matching = match(builder, attended.keys, tokens, remove, spec.prefix)
            x = feed_merged(builder, x, spec, layer, matching)
        elif remove:
            with builder.scope(f"{name}.{method.name}"):
                x = builder.reshape(x, -1, tokens, spec.width)  # (B, N, C)
                if method.name == "tome":
                    matching = match(builder, attended.keys, tokens, remove, spec.prefix)
                    x, size = merge(builder, matching, x, size)  # (B, N - r, C)
                    kept = matching.kept
                    if tracker:
                        tracker.follow_merge(matching)
                else:
                    ranked = attended.probabilities
                    x, kept = prune(builder, x, ranked, tokens, remove, spec.prefix)
                    if spec.positional or tracker:
                        kept = number_kept(builder, kept, tokens - remove, spec.prefix)
                    if tracker:
                        tracker.follow_prune(kept, tokens)
                if spec.positional:
                    places = keep_places(builder, places, kept)
                x = builder.reshape(x, -1, spec.width)  # (B·(N - r), C)
            tokens -= remove
        if not (remove and whole):
            x = feed_forward(builder, x, spec, layer)
        if tracker and trace:
            with builder.scope(f"{name}.map"):
                tracker.note_layer()
    return LastLayer(x, tokens, size, tracker)

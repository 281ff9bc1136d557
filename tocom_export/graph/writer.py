"""VitSpec + schedule + method → an ONNX model whose weights lie in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..compression.method import Method
from ..compression.schedule import TokenSchedule
from ..errors import UnsupportedModelError
from ..io.tensors import StoredTensor
from ..model.spec import VitSpec
from . import layers
from . import matching as reduce
from .builder import FLOAT, GraphTape
from .precision import TYPES, Types

OPSET = 18
IR_VERSION = 8  # the one that came with opset 18's generation; runtimes of 2023 read it


def write_graph(
    spec: VitSpec,
    schedule: TokenSchedule,
    method: Method,
    weights: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    types: Types = TYPES["fp32"],
    input_scales: Mapping[str, float] | None = None,
) -> ir.Model:
    """The graph of one model at one schedule.

    Input ``images`` (B, channels, height, width), normalised; output ``logits``
    (B, classes); both float32 in every precision. B is free, every other dimension fixed.

    Args:
        weights: PyTorch name → where the tensor lies; files are named relative to the graph.
        metadata: becomes the model's ``metadata_props``.
        types: what is computed in which type.
        input_scales: quantized layer → what one step of its int8 input stands for; the weights
            then hold such a layer's weight in int8, and its scales.

    Raises:
        UnsupportedModelError: EViT of a model without a class token.
    """
    if method.name == "evit" and not spec.class_token:
        raise UnsupportedModelError(spec.model, "EViT without a class token")
    tape = GraphTape(weights, types, input_scales)
    images = ir.val("images", FLOAT, ("batch", spec.channels, *spec.image_size))
    x = layers.embed(tape, images, spec)
    size: ir.Value | None = None
    tokens = spec.tokens
    for layer, remove in enumerate(schedule.removed):
        name = f"blocks.{layer}"
        with tape.scope(name):
            normed = tape.from_stream(layers.layer_norm(tape, x, f"{name}.norm1", spec.eps))
        attended = layers.attention(tape, normed, spec, method, layer, tokens, size)
        x = layers.residual(tape, x, attended.out, spec, layer, 1)
        if remove:
            with tape.scope(f"{name}.{method.name}"):
                x = tape.reshape(x, -1, tokens, spec.width)
                if method.name == "tome":
                    x, size = reduce.merge(
                        tape, x, size, attended.keys, tokens, remove, spec.prefix
                    )
                else:
                    x = reduce.prune(tape, x, attended.probabilities, tokens, remove, spec.prefix)
                x = tape.reshape(x, -1, spec.width)
            tokens -= remove
        with tape.scope(name):
            normed = tape.from_stream(layers.layer_norm(tape, x, f"{name}.norm2", spec.eps))
        x = layers.residual(tape, x, layers.mlp(tape, normed, spec, layer), spec, layer, 2)
    logits = layers.head(tape, x, spec, tokens, size)
    logits.name = "logits"
    logits.type = ir.TensorType(FLOAT)
    logits.shape = ir.Shape(["batch", spec.classes or spec.width])
    graph = ir.Graph(
        [images],
        [logits],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": OPSET},
        name=spec.model,
    )
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="tocom-export",
        metadata_props=dict(metadata),
    )

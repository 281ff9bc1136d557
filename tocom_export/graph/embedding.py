"""From images to tokens: patches, prefix tokens, positions."""

from __future__ import annotations

import onnx_ir as ir

from ..model.spec import VitSpec
from .builder import FLOAT, GraphBuilder
from .norm import normalise


def embed(builder: GraphBuilder, images: ir.Value, spec: VitSpec) -> ir.Value:
    """Images (B, channels, H, W) → tokens (B·N, C), prefix tokens in front; float32 → stream."""
    with builder.scope("embed"):
        images = builder.cast(images, FLOAT, builder.types.stream)
        x = _embed_patches(builder, images, spec)  # (B, patches, C)
        if spec.patch_norm:
            x = normalise(builder, x, "patch_embed.norm", spec)
        positions = builder.to_stream(builder.weight("pos_embed")) if spec.positions else None
        if positions is not None and not spec.prefix_positions:
            x = builder.op("Add", x, positions)
        if spec.prefix:
            x = _prepend_prefix(builder, x, images, spec)  # (B, N, C)
        if positions is not None and spec.prefix_positions:
            x = builder.op("Add", x, positions)
        x = builder.reshape(x, -1, spec.width)  # (B·N, C)
        return normalise(builder, x, "norm_pre", spec) if spec.pre_norm else x


def _embed_patches(builder: GraphBuilder, images: ir.Value, spec: VitSpec) -> ir.Value:
    """Images (B, channels, H, W) → (B, patches, C), a product with each patch; stream → stream."""
    # In the stream's type: opset 18 has no Conv of bfloat16.
    parts = ["weight"] + ["bias"] * spec.patch_bias
    weights = [builder.to_stream(builder.weight(f"patch_embed.proj.{part}")) for part in parts]
    patch = spec.patch_size
    x = builder.op("Conv", images, *weights, kernel_shape=patch, strides=patch)  # (B, C, H', W')
    x = builder.reshape(x, -1, spec.width, spec.patches)  # (B, C, patches)
    return builder.op("Transpose", x, perm=(0, 2, 1))


def _prepend_prefix(
    builder: GraphBuilder, x: ir.Value, images: ir.Value, spec: VitSpec
) -> ir.Value:
    """Patches (B, patches, C) → (B, N, C): class token, distillation token, registers in front."""
    names = ["cls_token"] * spec.class_token + ["dist_token"] * spec.distilled
    names += ["reg_token"] * bool(spec.registers)
    prefix = builder.weight(names[0])
    if len(names) > 1:
        prefix = builder.op("Concat", *map(builder.weight, names), axis=1)
    prefix = builder.to_stream(prefix)  # (1, P, C)
    batch = builder.op("Shape", images, start=0, end=1)
    shape = builder.op("Concat", batch, builder.ints(spec.prefix, spec.width), axis=0)
    return builder.op("Concat", builder.op("Expand", prefix, shape), x, axis=1)

"""The names and shapes of a ViT's weights, as timm's classes have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .spec import VitSpec

Shapes = dict[str, tuple[int, ...]]
HEADS = ("head.", "head_dist.")
"""What the names of the heads' weights begin with."""
POOLING = ("fc_norm.", "attn_pool.")
"""The same of what stands between the last layer's tokens and the heads."""


def list_weights(spec: VitSpec) -> Shapes:
    """PyTorch name → shape of every tensor in a checkpoint of a model."""
    shapes: Shapes = {}
    c = spec.width
    if spec.class_token:
        shapes["cls_token"] = (1, 1, c)
    if spec.distilled:
        shapes["dist_token"] = (1, 1, c)
    if spec.registers:
        shapes["reg_token"] = (1, spec.registers, c)
    if spec.positions:
        shapes["pos_embed"] = (1, spec.tokens if spec.prefix_positions else spec.patches, c)
    shapes["patch_embed.proj.weight"] = (c, spec.channels, *spec.patch_size)
    if spec.patch_bias:
        shapes["patch_embed.proj.bias"] = (c,)
    if spec.patch_norm:
        _norm(shapes, spec, "patch_embed.norm")
    if spec.pre_norm:
        _norm(shapes, spec, "norm_pre")
    if spec.rotary and spec.rotary.kind == "mixed":
        shapes["rope.freqs"] = (2, spec.depth, spec.heads, spec.head_width // 2)
    if spec.relative == "shared_mlp":
        _relative(shapes, spec, relative_name(spec, 0))
    for layer in range(spec.depth):
        _layer(shapes, spec, layer)
    if spec.final_norm:
        _norm(shapes, spec, spec.final_norm)
    if spec.pool == "map":
        _attention_pool(shapes, spec)
    if rows := spec.classes or spec.projection:
        _linear(shapes, "head", rows, spec.features, spec.head_bias)
        if spec.distilled:
            _linear(shapes, "head_dist", rows, c, True)
    return shapes


def qkv_parts(spec: VitSpec, layer: int) -> tuple[str, ...]:
    """Linear layers of queries, keys and values: one for all, or three in that order."""
    parts = ("q_proj", "k_proj", "v_proj") if spec.split_qkv else ("qkv",)
    return tuple(f"blocks.{layer}.attn.{part}" for part in parts)


def qkv_weights(spec: VitSpec) -> list[str]:
    """The tensors of all layers that a bank changes, and the keys' beside them."""
    return [f"{part}.weight" for i in range(spec.depth) for part in qkv_parts(spec, i)]


def mlp_inputs(spec: VitSpec, layer: int) -> tuple[str, ...]:
    """Linear layers that read an MLP's input: one, or gate and value."""
    parts = ("fc1_g", "fc1_x") if spec.mlp == "gated" else ("fc1",)
    return tuple(f"blocks.{layer}.mlp.{part}" for part in parts)


def layer_scale_name(spec: VitSpec, layer: int, which: int) -> str:
    """What a branch is scaled by: 1 of attention, 2 of the MLP."""
    name = f"gamma_{which}" if spec.family in ("eva", "beit") else f"ls{which}.gamma"
    return f"blocks.{layer}.{name}"


def relative_name(spec: VitSpec, layer: int) -> str:
    """The module that holds a layer's biases by relative position."""
    if spec.relative == "shared_mlp":
        return "shared_rel_pos"
    return f"blocks.{layer}.attn" + ("" if spec.family == "beit" else ".rel_pos")


def _layer(shapes: Shapes, spec: VitSpec, layer: int) -> None:
    c, m, block = spec.width, spec.mlp_width, f"blocks.{layer}"
    _norm(shapes, spec, f"{block}.norm1")
    parts = qkv_parts(spec, layer)
    for part in parts:
        biased = spec.qkv_bias and (spec.k_bias or (spec.split_qkv and part != parts[1]))
        _linear(shapes, part, c * (3 // len(parts)), c, biased)
    if spec.qkv_bias and not spec.k_bias and not spec.split_qkv:
        shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (c,)
    if spec.relative in ("table", "mlp"):
        _relative(shapes, spec, relative_name(spec, layer))
    if spec.qk_norm:
        _norm(shapes, spec, f"{block}.attn.q_norm", spec.head_width)
        _norm(shapes, spec, f"{block}.attn.k_norm", spec.head_width)
    if spec.attention_norm:
        _norm(shapes, spec, f"{block}.attn.norm")
    _linear(shapes, f"{block}.attn.proj", c, c, spec.linear_bias)
    _norm(shapes, spec, f"{block}.norm2")
    for part in mlp_inputs(spec, layer):
        _linear(shapes, part, 2 * m if spec.mlp == "packed" else m, c, spec.linear_bias)
    if spec.mlp_norm:
        _norm(shapes, spec, f"{block}.mlp.norm", m)
    _linear(shapes, f"{block}.mlp.fc2", c, m, spec.linear_bias)
    if spec.adapter_width:
        _linear(shapes, f"{block}.mlp.adapter_down", spec.adapter_width, c, True)
        _linear(shapes, f"{block}.mlp.adapter_up", c, spec.adapter_width, True)
    for which in spec.scaled:
        shapes[layer_scale_name(spec, layer, which)] = (c,)


def _relative(shapes: Shapes, spec: VitSpec, name: str) -> None:
    if spec.relative == "table":
        height, width = spec.grid
        pairs = (2 * height - 1) * (2 * width - 1) + 3 * bool(spec.prefix)
        shapes[f"{name}.relative_position_bias_table"] = (pairs, spec.heads)
    else:
        _linear(shapes, f"{name}.mlp.fc1", spec.relative_width, 2, True)
        _linear(shapes, f"{name}.mlp.fc2", spec.heads, spec.relative_width, True)


def _attention_pool(shapes: Shapes, spec: VitSpec) -> None:
    c, hidden = spec.width, spec.pool_mlp_width
    shapes["attn_pool.latent"] = (1, 1, c)
    _linear(shapes, "attn_pool.q", c, c, True)
    _linear(shapes, "attn_pool.kv", 2 * c, c, True)
    _linear(shapes, "attn_pool.proj", c, c, True)
    _norm(shapes, spec, "attn_pool.norm")
    _linear(shapes, "attn_pool.mlp.fc1", hidden, c, True)
    _linear(shapes, "attn_pool.mlp.fc2", c, hidden, True)


def _linear(shapes: Shapes, name: str, out: int, into: int, bias: bool) -> None:
    shapes[f"{name}.weight"] = (out, into)
    if bias:
        shapes[f"{name}.bias"] = (out,)


def _norm(shapes: Shapes, spec: VitSpec, name: str, width: int = 0) -> None:
    shapes[f"{name}.weight"] = (width or spec.width,)
    if spec.norms == "layer":
        shapes[f"{name}.bias"] = (width or spec.width,)

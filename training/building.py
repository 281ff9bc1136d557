"""From a VitSpec to a timm model of it, freshly initialised."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import (
    AttentionPoolLatent,
    LayerNorm,
    Mlp,
    RmsNorm,
    SwiGLU,
    SwiGLUPacked,
    get_act_layer,
)
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import (
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import nn

from tocom_export.model.spec import VitSpec

from .adaptformer import add_adapters


def vit_from_spec(spec: VitSpec, drop_path: float = 0.0) -> nn.Module:
    """A freshly initialised timm model; adapters have scale 1, as a checkpoint holds them."""
    build = {"vit": _build_vit, "eva": _build_eva, "beit": _build_beit, "relpos": _build_relpos}
    model: Any = build[spec.family](spec, drop_path)
    if spec.patch_bias == (model.patch_embed.proj.bias is None):  # timm ties it to pre_norm
        model.patch_embed.proj = nn.Conv2d(
            spec.channels, spec.width, spec.patch_size, spec.patch_size, bias=spec.patch_bias
        )
    if spec.pool == "map":
        model.attn_pool = AttentionPoolLatent(
            spec.width,
            num_heads=spec.pool_heads,
            mlp_ratio=_ratio(spec.pool_mlp_width, spec),
            norm_layer=_norm_layer(spec),
            act_layer=get_act_layer(spec.pool_activation),
        )
    own = spec.pool == "token_avg" or not spec.head_bias  # timm makes no such head
    if spec.projection or (spec.classes and own):
        rows = spec.classes or spec.projection
        model.head = nn.Linear(spec.features, rows, bias=spec.head_bias)
    model.global_pool = spec.pool  # timm has no name for token_avg
    if spec.adapter_width:
        add_adapters(model, spec.adapter_width, scale=1.0)
    vit: nn.Module = model.eval()
    return vit


def _build_vit(spec: VitSpec, drop_path: float) -> nn.Module:
    kind = VisionTransformerDistilled if spec.distilled else VisionTransformer
    hidden = spec.mlp_width * (2 if spec.mlp == "packed" else 1)
    mlps: dict[str, Any] = {"plain": Mlp, "packed": SwiGLUPacked, "gated": SwiGLU}
    return kind(
        **_shared(spec, drop_path),
        mlp_ratio=_ratio(hidden, spec),
        mlp_layer=mlps[spec.mlp],
        qk_norm=spec.qk_norm,
        scale_attn_norm=spec.attention_norm,
        scale_mlp_norm=spec.mlp_norm,
        proj_bias=spec.linear_bias,
        class_token=spec.class_token,
        no_embed_class=not spec.prefix_positions,
        reg_tokens=spec.registers,
        pre_norm=spec.pre_norm,
        final_norm=spec.final_norm is not None,
        fc_norm=spec.final_norm == "fc_norm",
        pool_include_prefix=spec.pool_prefix,
        embed_norm_layer=_norm_layer(spec) if spec.patch_norm else None,
        block_fn=ResPostBlock if spec.post_norm else Block,
        act_layer=get_act_layer(spec.activation),
    )


def _build_eva(spec: VitSpec, drop_path: float) -> nn.Module:
    rotary: dict[str, Any] = {}
    if spec.rotary is not None:
        rotary = {
            "use_rot_pos_emb": True,
            "rope_type": spec.rotary.kind,
            "rope_temperature": spec.rotary.temperature,
            "rope_rotate_half": spec.rotary.half,
            "rope_grid_indexing": spec.rotary.indexing,
            "rope_grid_offset": spec.rotary.offset,
            "ref_feat_shape": spec.rotary.reference,
        }
    # Said where it is needed alone: older versions of timm don't know it.
    scales: dict[str, Any] = {} if spec.mlp_scale else {"attn_only_layer_scale": True}
    return Eva(
        **scales,
        **_shared(spec, drop_path),
        mlp_ratio=_ratio(spec.mlp_width, spec),
        swiglu_mlp=spec.mlp != "plain",
        swiglu_align_to=1 if spec.mlp == "gated" else 0,  # else timm packs gate and value
        scale_mlp=spec.mlp_norm,
        scale_attn_inner=spec.attention_norm,
        attn_type="rope" if spec.qkv_bias and spec.k_bias else "eva",
        qkv_fused=not spec.split_qkv,
        qk_norm=spec.qk_norm,
        class_token=spec.class_token,
        num_reg_tokens=spec.registers,
        no_embed_class=not spec.prefix_positions,
        use_abs_pos_emb=spec.positions,
        use_post_norm=spec.post_norm,
        use_pre_transformer_norm=spec.pre_norm,
        use_post_transformer_norm=spec.final_norm == "norm",
        use_fc_norm=spec.final_norm == "fc_norm",
        **rotary,
    )


def _build_beit(spec: VitSpec, drop_path: float) -> nn.Module:
    return Beit(
        **_shared(spec, drop_path),
        mlp_ratio=_ratio(spec.mlp_width, spec),
        swiglu_mlp=spec.mlp == "gated",
        scale_mlp=spec.mlp_norm,
        use_abs_pos_emb=spec.positions,
        use_rel_pos_bias=spec.relative is not None,
        use_fc_norm=spec.final_norm == "fc_norm",
    )


def _build_relpos(spec: VitSpec, drop_path: float) -> nn.Module:
    return VisionTransformerRelPos(
        **_shared(spec, drop_path),
        mlp_ratio=_ratio(spec.mlp_width, spec),
        qk_norm=spec.qk_norm,
        class_token=spec.class_token,
        fc_norm=spec.final_norm == "fc_norm",
        rel_pos_type="bias" if spec.relative == "table" else "mlp",
        rel_pos_dim=spec.relative_width or None,
        shared_rel_pos=spec.relative == "shared_mlp",
        block_fn=ResPostRelPosBlock if spec.post_norm else RelPosBlock,
    )


def _shared(spec: VitSpec, drop_path: float) -> dict[str, Any]:
    """What all of timm's classes take."""
    return {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "in_chans": spec.channels,
        "num_classes": spec.classes,
        "global_pool": "token" if spec.pool == "token_avg" else spec.pool,
        "embed_dim": spec.width,
        "depth": spec.depth,
        "num_heads": spec.heads,
        "qkv_bias": spec.qkv_bias,
        "init_values": 1e-5 if spec.layer_scale else None,
        "drop_path_rate": drop_path,
        "norm_layer": _norm_layer(spec),
    }


def _ratio(width: int, spec: VitSpec) -> float:
    return (width + 0.5) / spec.width  # timm truncates the product


def _norm_layer(spec: VitSpec) -> Any:
    return partial(LayerNorm if spec.norms == "layer" else RmsNorm, eps=spec.eps)

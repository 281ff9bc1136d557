"""Reading a VitSpec off a live timm model.

Looks at attributes and class names alone, so this module needs neither torch nor timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedModelError
from .preprocess import Preprocess
from .rotary import Rotary
from .spec import VitSpec
from .timm_blocks import describe_blocks, describe_norms
from .timm_parts import Need, explain, kind, read_activation

_FAMILIES = {
    "VisionTransformer": "vit",
    "VisionTransformerDistilled": "vit",
    "Eva": "eva",
    "Beit": "beit",
    "VisionTransformerRelPos": "relpos",
}


def spec_from_timm(vit: Any, name: str | None = None) -> VitSpec:
    """The spec of a timm ``VisionTransformer``, or of one of its relatives.

    Args:
        vit: the model, on any device (``meta`` will do).
        name: what to call it; default: the name timm created it under.

    Raises:
        UnsupportedModelError: names the first part that a spec can't express.
    """
    cfg = getattr(vit, "pretrained_cfg", None) or {}
    name = name or cfg.get("architecture") or kind(vit)

    def need(condition: bool, part: str) -> None:
        if not condition:
            raise UnsupportedModelError(name, part)

    need(kind(vit) in _FAMILIES, f"model class {explain(vit)}")
    need(type(vit).__module__.startswith("timm."), f"model class {kind(vit)} from outside timm")
    family = _FAMILIES[kind(vit)]
    blocks = list(vit.blocks)
    embedding = _describe_embedding(vit, family, need)
    layers = describe_blocks(name, blocks, vit.embed_dim, need)
    relative = _describe_relative(vit, family, need)
    pool = _describe_pool(name, vit, need)
    distilled = kind(vit) == "VisionTransformerDistilled"
    if distilled:
        plain = not vit.no_embed_class and vit.reg_token is None and vit.global_pool == "token"
        need(plain and kind(vit.fc_norm) == "Identity", "this kind of distilled model")
    norms = [n for n in ("norm", "fc_norm") if kind(getattr(vit, n)) != "Identity"]
    need(len(norms) < 2, "a norm before the pooling and one after it")
    registers = getattr(vit, "reg_token", None)
    embeds = not vit.num_classes and kind(vit.head) == "Linear"
    return VitSpec(
        model=name,
        family=family,  # type: ignore[arg-type]
        classes=vit.num_classes,
        projection=vit.head.out_features if embeds else 0,
        distilled=distilled,
        registers=0 if registers is None else registers.shape[1],
        final_norm=norms[0] if norms else None,  # type: ignore[arg-type]
        head_bias=getattr(vit.head, "bias", True) is not None,
        **describe_norms(vit, norms, need),
        **embedding,
        **layers,
        **relative,
        **pool,
    )


def _describe_embedding(vit: Any, family: str, need: Need) -> dict[str, Any]:
    """Patches, prefix tokens and positions, as a spec has them."""
    patches = vit.patch_embed
    need(kind(patches) == "PatchEmbed", f"patch embedding {explain(patches)}")
    need(kind(getattr(vit, "patch_drop", None)) in ("Identity", "NoneType"), "patch dropout")
    rotary = _describe_rotary(vit, need)
    positions = getattr(vit, "pos_embed", None) is not None
    relative = family in ("beit", "relpos")
    need(positions or rotary is not None or relative, "a model without position embedding")
    return {
        "image_size": tuple(patches.img_size),
        "patch_size": tuple(patches.patch_size),
        "channels": patches.proj.in_channels,
        "width": vit.embed_dim,
        "patch_bias": patches.proj.bias is not None,
        "patch_norm": kind(patches.norm) != "Identity",
        "class_token": getattr(vit, "cls_token", None) is not None,
        "positions": positions,
        "prefix_positions": not getattr(vit, "no_embed_class", False),
        "rotary": rotary,
        "pre_norm": kind(getattr(vit, "norm_pre", None)) not in ("Identity", "NoneType"),
    }


def _describe_rotary(vit: Any, need: Need) -> Rotary | None:
    rope = getattr(vit, "rope", None)
    if rope is None:
        return None
    half = bool(getattr(vit.blocks[0].attn, "rotate_half", False))
    if kind(rope) == "RotaryEmbeddingMixed":
        return Rotary("mixed", half=half, indexing=rope.grid_indexing)
    if kind(rope) == "RotaryEmbeddingDinoV3":
        usual = rope.min_period is None and rope.normalize_coords == "separate"
        need(usual, "this kind of rotary positions")
        return Rotary("dinov3", rope.temperature, half, rope.grid_indexing, rope.grid_offset)
    need(kind(rope) == "RotaryEmbeddingCat", f"rotary positions {kind(rope)}")
    need(not rope.in_pixels, "rotary positions in pixels")
    reference = tuple(rope.ref_feat_shape) if rope.ref_feat_shape else None
    return Rotary(
        "cat",
        rope.temperature,
        half,
        rope.grid_indexing,
        rope.grid_offset,
        reference,
    )


def _describe_relative(vit: Any, family: str, need: Need) -> dict[str, Any]:
    """Biases by relative position, as a spec has them."""
    if family == "beit":
        need(vit.rel_pos_bias is None, "relative positions that layers share")
        table = vit.blocks[0].attn.relative_position_bias_table is not None
        return {"relative": "table" if table else None}
    if family != "relpos":
        return {}
    shared = vit.shared_rel_pos is not None
    module = vit.shared_rel_pos if shared else vit.blocks[0].attn.rel_pos
    if kind(module) == "RelPosBias":
        need(not shared, "relative positions that layers share")
        return {"relative": "table"}
    need(kind(module) == "RelPosMlp" and module.mode == "cr", "this kind of relative positions")
    width = module.mlp.fc1.out_features
    return {"relative": "shared_mlp" if shared else "mlp", "relative_width": width}


def _describe_pool(name: str, vit: Any, need: Need) -> dict[str, Any]:
    """What the head reads, as a spec has it."""
    need(vit.global_pool in ("token", "avg", "map", "token_avg"), f"pooling {vit.global_pool!r}")
    whole = bool(getattr(vit, "pool_include_prefix", False))
    if vit.global_pool != "map":
        need(not whole, "pooling that includes the prefix tokens")
        return {"pool": vit.global_pool}
    pool = vit.attn_pool
    need(kind(pool) == "AttentionPoolLatent", f"attention pooling {kind(pool)}")
    plain = pool.latent_len == 1 and pool.pos_embed is None and pool.pool == "token"
    plain = plain and kind(pool.q) == "Linear" and kind(pool.q_norm) == "Identity"
    need(plain and pool.latent_dim == vit.embed_dim, "this kind of attention pooling")
    need(pool.mlp is not None and pool.q.bias is not None, "attention pooling without an MLP")
    activation = read_activation(name, pool.mlp.act)
    gated = kind(vit.blocks[0].mlp) != "Mlp"
    wanted = "gelu" if kind(vit) == "Eva" else read_activation(name, vit.blocks[0].mlp.act)
    same = activation == wanted and (kind(vit) == "Eva" or not gated)
    need(same, "attention pooling of another activation")
    hidden = pool.mlp.fc1.out_features
    sizes = {"pool_heads": pool.num_heads, "pool_mlp_width": hidden}
    return {"pool": "map", "pool_prefix": whole, **sizes}


def preprocess_from_cfg(cfg: Mapping[str, Any]) -> Preprocess:
    """The image statistics in timm's ``pretrained_cfg``; ImageNet's where it says none.

    Raises:
        InputError: it asks for a crop or an interpolation that we don't know.
    """
    known = Preprocess()
    return Preprocess(
        mean=tuple(cfg.get("mean") or known.mean),
        std=tuple(cfg.get("std") or known.std),
        crop_pct=cfg.get("crop_pct") or known.crop_pct,
        interpolation=cfg.get("interpolation") or known.interpolation,
        crop_mode=cfg.get("crop_mode") or known.crop_mode,
    )

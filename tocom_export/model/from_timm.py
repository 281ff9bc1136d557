"""Reading a VitSpec off a live timm model.

Looks at attributes and class names alone, so this module needs neither torch nor timm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UnsupportedModelError
from .preprocess import Preprocess
from .spec import Activation, VitSpec

_WORDS = {
    "Beit": "relative positions",
    "VisionTransformerRelPos": "relative positions",
    "VisionTransformerSAM": "windows, relative positions",
    "HybridEmbed": "convolutions",
    "GluMlp": "gated, as SwiGLU",
}
"""What some classes of timm have that a spec can't express; the names of others say it."""


def spec_from_timm(vit: Any, name: str | None = None) -> VitSpec:
    """The spec of a timm ``VisionTransformer`` or ``VisionTransformerDistilled``.

    Args:
        vit: the model, on any device (``meta`` will do).
        name: what to call it; default: the name timm created it under.

    Raises:
        UnsupportedModelError: names the first part that a spec can't express.
    """
    kind = _kind(vit)
    cfg = getattr(vit, "pretrained_cfg", None) or {}
    name = name or cfg.get("architecture") or kind

    def need(condition: bool, part: str) -> None:
        if not condition:
            raise UnsupportedModelError(name, part)

    need(
        kind in ("VisionTransformer", "VisionTransformerDistilled"), f"model class {_explain(vit)}"
    )
    need(type(vit).__module__.startswith("timm."), f"model class {kind} from outside timm")
    need(vit.pos_embed is not None, "a model without position embedding")
    need(_kind(vit.patch_embed) == "PatchEmbed", f"patch embedding {_explain(vit.patch_embed)}")
    need(_kind(vit.patch_embed.norm) == "Identity", "a norm in the patch embedding")
    need(getattr(vit, "attn_pool", None) is None, "attention pooling")
    need(vit.global_pool in ("token", "avg"), f"pooling {vit.global_pool!r}")
    need(not vit.pool_include_prefix, "pooling that includes the prefix tokens")
    need(_kind(vit.patch_drop) == "Identity", "patch dropout")

    _check_blocks(name, vit, need)
    blocks = list(vit.blocks)
    first = blocks[0]
    distilled = kind == "VisionTransformerDistilled"
    if distilled:
        plain = not vit.no_embed_class and vit.reg_token is None and vit.global_pool == "token"
        need(plain and _kind(vit.fc_norm) == "Identity", "this kind of distilled model")
    final_norm = next(
        (n for n in ("norm", "fc_norm") if _kind(getattr(vit, n)) != "Identity"), None
    )
    pre_norm = _kind(vit.norm_pre) != "Identity"
    qk_norm = _kind(first.attn.q_norm) != "Identity"
    _check_norms(vit, need, final_norm, pre_norm, qk_norm)
    return VitSpec(
        model=name,
        image_size=tuple(vit.patch_embed.img_size),
        patch_size=tuple(vit.patch_embed.patch_size),
        channels=vit.patch_embed.proj.in_channels,
        width=vit.embed_dim,
        depth=len(blocks),
        heads=first.attn.num_heads,
        mlp_width=first.mlp.fc1.out_features,
        classes=vit.num_classes,
        eps=first.norm1.eps,
        activation=_activation(name, first.mlp.act),
        qkv_bias=first.attn.qkv.bias is not None,
        linear_bias=first.attn.proj.bias is not None,
        patch_bias=vit.patch_embed.proj.bias is not None,
        class_token=vit.cls_token is not None,
        distilled=distilled,
        registers=0 if vit.reg_token is None else vit.reg_token.shape[1],
        prefix_positions=not vit.no_embed_class,
        pre_norm=pre_norm,
        layer_scale=_kind(first.ls1) == "LayerScale",
        qk_norm=qk_norm,
        pool=vit.global_pool,
        final_norm=final_norm,  # type: ignore[arg-type]
        adapter_width=_adapter_width(first.mlp),
    )


def _check_blocks(name: str, vit: Any, need: Callable[[bool, str], None]) -> None:
    """All layers are of one kind, which a spec can express."""
    blocks = list(vit.blocks)
    for block in blocks:
        need(_kind(block) == "Block", f"block {_kind(block)}")
        attn, mlp = block.attn, block.mlp
        need(_kind(attn) == "Attention", f"attention {_kind(attn)}")
        need(getattr(attn, "gate", None) is None, "gated attention")
        need(_kind(getattr(attn, "norm", None)) in ("Identity", "NoneType"), "attention norm")
        need(attn.num_heads * attn.head_dim == vit.embed_dim, "attention of another width")
        need(_kind(mlp) in ("Mlp", "AdaptedMlp"), f"MLP {_explain(mlp)}")
        need(_kind(mlp.fc1) == "Linear", f"an MLP of {_kind(mlp.fc1)} layers")
        need(_kind(mlp.norm) == "Identity", "a norm inside the MLP")
        _activation(name, mlp.act)
        need(_kind(block.ls1) in ("Identity", "LayerScale"), f"layer scale {_kind(block.ls1)}")
    first = blocks[0]
    need(all(_layout(b) == _layout(first) for b in blocks), "layers that differ from one another")
    biases = [m.bias is None for m in (first.attn.proj, first.mlp.fc1, first.mlp.fc2)]
    need(len(set(biases)) == 1, "biases on some of a layer's projections only")
    need(_kind(first.ls1) == _kind(first.ls2), "layer scale on one of two branches")
    need(_kind(first.attn.q_norm) == _kind(first.attn.k_norm), "a norm on queries or keys only")


def _check_norms(
    vit: Any,
    need: Callable[[bool, str], None],
    final_norm: str | None,
    pre_norm: bool,
    qk_norm: bool,
) -> None:
    """All norms are LayerNorms alike."""
    blocks = list(vit.blocks)
    norms = [n for b in blocks for n in (b.norm1, b.norm2)]
    norms += [getattr(vit, final_norm)] if final_norm else []
    norms += [vit.norm_pre] if pre_norm else []
    norms += [n for b in blocks for n in (b.attn.q_norm, b.attn.k_norm)] if qk_norm else []
    for norm in norms:
        need(_kind(norm) == "LayerNorm", f"norm {_kind(norm)}")
        affine = norm.weight is not None and norm.bias is not None
        need(affine, "a LayerNorm without weight or bias")
        need(norm.eps == blocks[0].norm1.eps, "LayerNorms of different epsilon")


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


def _layout(block: Any) -> tuple[object, ...]:
    """What a spec says of one layer, and so must be the same in all."""
    attn, mlp = block.attn, block.mlp
    return (
        *(_kind(m) for m in (mlp.act, block.ls1, block.ls2, attn.q_norm, attn.k_norm)),
        *(m.bias is None for m in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)),
        *(attn.num_heads, mlp.fc1.out_features, getattr(mlp.act, "approximate", None)),
        _adapter_width(mlp),
    )


def _adapter_width(mlp: Any) -> int:
    """Bottleneck of the branch that ``training.adapter`` puts beside an MLP; 0 for none."""
    return int(mlp.adapter_down.out_features) if _kind(mlp) == "AdaptedMlp" else 0


def _kind(module: Any) -> str:
    return type(module).__name__


def _explain(module: Any) -> str:
    """The name of a class that isn't supported, and what it stands for."""
    kind = _kind(module)
    rotary = getattr(module, "rope", None) is not None
    words = "rotary positions" if rotary else _WORDS.get(kind)
    return f"{kind} ({words})" if words else kind


def _activation(model: str, module: Any) -> Activation:
    kind = _kind(module)
    if kind == "GELU" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    names: dict[str, Activation] = {
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "QuickGELU": "quick_gelu",
        "ReLU": "relu",
    }
    if kind not in names:
        raise UnsupportedModelError(model, f"activation {kind}")
    return names[kind]

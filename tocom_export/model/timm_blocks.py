"""What the layers of a timm model are, once they are of one kind that a spec can express."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .timm_parts import Need, explain, is_there, kind, read_activation

_PRE_NORM = ("Block", "EvaBlock", "RelPosBlock")
_POST_NORM = ("ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock")
_ATTENTION = ("Attention", "EvaAttention", "AttentionRope", "RelPosAttention")
_MLPS = {"Mlp": "plain", "AdaptedMlp": "plain", "GluMlp": "packed", "SwiGLU": "gated"}
_NORMS = {"LayerNorm": "layer", "RmsNorm": "rms"}


def describe_blocks(name: str, blocks: Sequence[Any], width: int, need: Need) -> dict[str, Any]:
    """A spec's fields about its layers.

    Raises:
        UnsupportedModelError: names the first part that a spec can't express.
    """
    found = [_describe(name, block, width, need) for block in blocks]
    need(all(each == found[0] for each in found), "layers that differ from one another")
    return {"depth": len(blocks), **found[0]}


def describe_norms(vit: Any, final: Sequence[str], need: Need) -> dict[str, Any]:
    """A spec's fields about all norms, which must be alike."""
    found = [getattr(vit, name) for name in final]
    found += [vit.patch_embed.norm, getattr(vit, "norm_pre", None)]
    pool = getattr(vit, "attn_pool", None)
    found += [pool.norm] if pool is not None else []
    for block in vit.blocks:
        attn, mlp = block.attn, block.mlp
        found += [block.norm1, block.norm2, getattr(mlp, "norm", None)]
        found += [getattr(attn, part, None) for part in ("q_norm", "k_norm", "norm")]
    norms = [norm for norm in found if is_there(norm)]
    first = vit.blocks[0].norm1
    for norm in norms:
        need(kind(norm) in _NORMS, f"norm {kind(norm)}")
        need(kind(norm) == kind(first), "norms of different kinds")
        affine = norm.weight is not None and getattr(norm, "bias", True) is not None
        need(affine, f"a {kind(norm)} without weight or bias")
        need(norm.eps == first.eps, "norms of different epsilon")
    return {"norms": _NORMS[kind(first)], "eps": first.eps}


def _describe(name: str, block: Any, width: int, need: Need) -> dict[str, Any]:
    need(kind(block) in (*_PRE_NORM, *_POST_NORM), f"block {kind(block)}")
    attn, mlp = block.attn, block.mlp
    fields = {**_describe_attention(attn, width, need), **_describe_mlp(name, mlp, need)}
    biases = {attn.proj.bias is None, *(layer.bias is None for layer in _layers(mlp))}
    need(len(biases) == 1, "biases on some of a layer's projections only")
    for scale in (getattr(block, f"ls{which}", None) for which in (1, 2)):
        known = ("NoneType", "Identity", "LayerScale")
        need(kind(scale) in known, f"layer scale {kind(scale)}")
    scales = [_has_scale(block, which) for which in (1, 2)]
    attention_only = kind(block) == "EvaBlock" and scales == [True, False]
    need(scales[0] == scales[1] or attention_only, "layer scale on one of two branches")
    return {
        **fields,
        "linear_bias": biases == {False},
        "layer_scale": scales[0],
        "mlp_scale": not attention_only,
        "post_norm": kind(block) in _POST_NORM,
        "adapter_width": _adapter_width(mlp),
    }


def _describe_attention(attn: Any, width: int, need: Need) -> dict[str, Any]:
    need(kind(attn) in _ATTENTION, f"attention {kind(attn)}")
    need(getattr(attn, "gate", None) is None, "gated attention")
    need(getattr(attn, "num_kv_groups", 1) == 1, "queries that share keys (GQA)")
    split = attn.qkv is None
    out = attn.q_proj.out_features if split else attn.qkv.out_features // 3
    need(out == width, "attention of another width")
    if split:
        biases = [part.bias is not None for part in (attn.q_proj, attn.k_proj, attn.v_proj)]
        need(biases[0] == biases[2], "biases of queries or values only")
        q_bias, k_bias = biases[:2]
    else:
        whole = attn.qkv.bias is not None
        q_bias = whole or getattr(attn, "q_bias", None) is not None
        k_bias = whole or not q_bias
    norms = [is_there(getattr(attn, part, None)) for part in ("q_norm", "k_norm")]
    need(norms[0] == norms[1], "a norm on queries or keys only")
    return {
        "heads": attn.num_heads,
        "qkv_bias": q_bias,
        "k_bias": k_bias or not q_bias,
        "split_qkv": split,
        "qk_norm": norms[0],
        "attention_norm": is_there(getattr(attn, "norm", None)),
    }


def _describe_mlp(name: str, mlp: Any, need: Need) -> dict[str, Any]:
    need(kind(mlp) in _MLPS, f"MLP {explain(mlp)}")
    form = _MLPS[kind(mlp)]
    need(all(kind(layer) == "Linear" for layer in _layers(mlp)), "an MLP of convolutions")
    need(not getattr(mlp, "gate_last", False), "an MLP whose gate comes last")
    activation = read_activation(name, mlp.act)
    need(form == "plain" or activation == "silu", "an MLP with another gate than SiLU")
    return {
        "mlp": form,
        "mlp_width": mlp.fc2.in_features,
        "mlp_norm": is_there(getattr(mlp, "norm", None)),
        "activation": activation,
    }


def _layers(mlp: Any) -> list[Any]:
    names = ("fc1_g", "fc1_x", "fc2") if kind(mlp) == "SwiGLU" else ("fc1", "fc2")
    return [getattr(mlp, name) for name in names]


def _has_scale(block: Any, which: int) -> bool:
    if hasattr(block, f"ls{which}"):
        return kind(getattr(block, f"ls{which}")) == "LayerScale"
    return getattr(block, f"gamma_{which}", None) is not None


def _adapter_width(mlp: Any) -> int:
    """Bottleneck of the branch that ``training.adaptformer`` puts beside an MLP; 0 for none."""
    return int(mlp.adapter_down.out_features) if kind(mlp) == "AdaptedMlp" else 0

"""transformers' tensors → timm's, by name and layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ...errors import CheckpointError
from ...io.tensors import Array
from ..spec import VitSpec
from ..weight_names import layer_scale_name, relative_name

_PREFIX = re.compile(
    r"(?:(?:_orig_mod|module|vit|deit|dinov2|dinov2_with_registers|dinov3_vit|beit|data2vec_vision"
    r"|vision_model|model)\.)*"
)
_UNNEEDED = re.compile(
    r"(?:embeddings\.(?:mask_token|position_ids)$|pooler\.(?!layernorm\.)|decoder\.|text_model\."
    r"|text_projection\.|logit_(?:scale|bias)$|rope_embeddings\.|.*\brelative_position_index$)"
)
"""Of pre-training, of text, tanh poolers, which no head of ours reads, and what is computed."""
_LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)\.(weight|bias|lambda1)")
_SCALE = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.lambda_([12])")
_TABLE = re.compile(
    r"(?:encoder\.)?(?:layers?\.(\d+)\.(?:attention\.attention\.)?)?"
    r"(?:relative|shared)_position_bias\.(relative_position_bias_table)"
)
"""Of one layer, or of all (without a number)."""
_IN_LAYER = {
    "layernorm_before": "norm1", "layer_norm1": "norm1", "norm1": "norm1",
    "layernorm_after": "norm2", "layer_norm2": "norm2", "norm2": "norm2",
    "attention.attention.query": "q", "self_attn.q_proj": "q", "attention.q_proj": "q",
    "attention.attention.key": "k", "self_attn.k_proj": "k", "attention.k_proj": "k",
    "attention.attention.value": "v", "self_attn.v_proj": "v", "attention.v_proj": "v",
    "attention.output.dense": "attn.proj", "self_attn.out_proj": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1", "mlp.weights_out": "mlp.fc2",
    "mlp.gate_proj": "mlp.fc1_g", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2",
}  # fmt: skip
_OUTSIDE = {
    "embeddings.cls_token": "cls_token", "embeddings.class_embedding": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "head.probe": "attn_pool.latent",
}  # fmt: skip
_MODULES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "norm_pre", "layernorm": "norm", "post_layernorm": "norm", "norm": "norm",
    "pooler.layernorm": "fc_norm",
    "classifier": "head", "cls_classifier": "head", "visual_projection": "head",
    "distillation_classifier": "head_dist",
    "head.attention.out_proj": "attn_pool.proj", "head.layernorm": "attn_pool.norm",
    "head.mlp.fc1": "attn_pool.mlp.fc1", "head.mlp.fc2": "attn_pool.mlp.fc2",
}  # fmt: skip


def is_huggingface(names: Iterable[str]) -> bool:
    """Whether tensors have the names that transformers gives them."""
    return any(re.search(r"(^|\.)embeddings\.patch_embeddings?\.", name) for name in names)


def list_needed(names: Iterable[str]) -> list[str]:
    """The tensors that may be of an encoder or its head: transformers' have more in one file."""
    named = list(names)
    if is_huggingface(named):
        return [name for name in named if not _UNNEEDED.match(_strip(name))]
    return [name for name in named if not name.endswith(".relative_position_index")]  # integers


def count_layers(names: Iterable[str]) -> int:
    """Layers that tensors are of, by the names that :func:`strip_names` gives them."""
    found = (re.match(r"(?:encoder\.)?layers?\.(\d+)\.", name) for name in names)
    return len({match[1] for match in found if match})


def strip_names(tensors: Mapping[str, Array], place: Path) -> dict[str, Array]:
    """Those that are needed, by their names within the model that holds the layers.

    Raises:
        CheckpointError: two would have one name.
    """
    found: dict[str, Array] = {}
    for name in list_needed(tensors):
        if (short := _strip(name)) in found:
            raise CheckpointError(f"{place}: two tensors are {short}; {name} is one of them.")
        found[short] = tensors[name]
    return found


def to_timm(tensors: Mapping[str, Array], spec: VitSpec, place: Path) -> dict[str, Array]:
    """The same weights as timm has them; a name that we don't know stays as it is.

    What stands beside a head that doesn't read it is left out.

    Args:
        tensors: as :func:`strip_names` names them.
        place: the file or folder that they are from.

    Raises:
        CheckpointError: two tensors are the same weight.
    """
    found: dict[str, Array] = {}
    unused = _list_unused(tensors, spec)
    for name, tensor in tensors.items():
        if name.startswith(unused):
            continue
        new = _rename(name, spec)
        if new in found:
            raise CheckpointError(f"{place}: two tensors are {new}; {name} is one of them.")
        found[new] = tensor
    found = {name: array for name, array in found.items() if array.size or name != "reg_token"}
    for name, rank in {"cls_token": 3, "pos_embed": 3}.items():
        if name in found:  # (C,) or (N, C) of CLIP and SigLIP → (1, N, C)
            found[name] = found[name][(None,) * (rank - found[name].ndim)]
    _join_qkv(found, spec)
    _split_pooling(found, spec)
    _fold_position(found, spec)
    _spread_table(found, spec)
    return found


def _strip(name: str) -> str:
    return _PREFIX.sub("", name, count=1)


def _list_unused(names: Iterable[str], spec: VitSpec) -> tuple[str, ...]:
    """Beginnings of names that a model with a classifier has and doesn't use (CLIP, SigLIP)."""
    if "classifier.weight" not in names:
        return ()
    norm, pool = spec.final_norm is None, spec.pool != "map"
    return ("visual_projection.", *["post_layernorm."] * norm, *["head."] * pool)


def _rename(name: str, spec: VitSpec) -> str:
    if match := _LAYER.fullmatch(name):
        layer, module, leaf = int(match[1]), match[2], match[3]
        if leaf == "lambda1" and module in ("layer_scale1", "layer_scale2"):
            return layer_scale_name(spec, layer, int(module[-1]))
        if module in _IN_LAYER:
            new = "mlp.fc1_x" if spec.mlp == "gated" and module == "mlp.up_proj" else None
            return f"blocks.{layer}.{new or _IN_LAYER[module]}.{leaf}"
        return name
    if match := _SCALE.fullmatch(name):
        return layer_scale_name(spec, int(match[1]), int(match[2]))
    if match := _TABLE.fullmatch(name):
        return f"{relative_name(spec, int(match[1]))}.{match[2]}" if match[1] else match[2]
    if name == "embeddings.distillation_token":
        return "dist_token" if spec.distilled else "reg_token"
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias") and module in _MODULES:
        return f"{_MODULES[module]}.{leaf}"
    return _OUTSIDE.get(name, name)


def _join_qkv(found: dict[str, Array], spec: VitSpec) -> None:
    """Queries', keys' and values' rows one after another, as far as all are there."""
    for layer in range(spec.depth):
        block = f"blocks.{layer}"
        if spec.qkv_bias and not spec.k_bias:  # timm keeps these two by themselves
            for part in "qv":
                if (name := f"{block}.{part}.bias") in found:
                    found[f"{block}.attn.{part}_bias"] = found.pop(name)
        for leaf in ("weight", "bias"):
            parts = [found.get(f"{block}.{part}.{leaf}") for part in "qkv"]
            there = [part for part in parts if part is not None]
            if len(there) == 3 and len({part.shape[1:] for part in there}) == 1:
                for part in "qkv":
                    del found[f"{block}.{part}.{leaf}"]
                found[f"{block}.attn.qkv.{leaf}"] = np.concatenate(there)


def _split_pooling(found: dict[str, Array], spec: VitSpec) -> None:
    """Attention pooling's queries apart from its keys and values."""
    for leaf in ("weight", "bias"):
        whole = found.pop(f"head.attention.in_proj_{leaf}", None)
        if whole is not None:
            found[f"attn_pool.q.{leaf}"] = whole[: spec.width]
            found[f"attn_pool.kv.{leaf}"] = whole[spec.width :]


def _fold_position(found: dict[str, Array], spec: VitSpec) -> None:
    """The class token's position into the token itself, where registers have no positions."""
    if spec.registers and spec.positions and not spec.prefix_positions:
        token, positions = found.get("cls_token"), found.get("pos_embed")
        if token is not None and positions is not None and positions.ndim == 3:
            first = positions[:, :1]
            if token.shape == first.shape:
                found["cls_token"] = token.astype(np.float32) + first.astype(np.float32)
            found["pos_embed"] = positions[:, 1:]


def _spread_table(found: dict[str, Array], spec: VitSpec) -> None:
    """Biases that layers share into each layer's own, to which they are added (BEiT)."""
    shared = found.pop(table := "relative_position_bias_table", None)
    if shared is None:
        return
    for layer in range(spec.depth):
        own = found.get(name := f"{relative_name(spec, layer)}.{table}")
        if own is None or own.shape != shared.shape:
            found[name] = shared
        else:
            found[name] = own.astype(np.float32) + shared.astype(np.float32)

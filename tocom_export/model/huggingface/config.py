"""``config.json`` → a VitSpec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, InputError, UnsupportedModelError
from ...io.json_codec import decode
from ..spec import ACTIVATIONS, VitSpec
from .files import CONFIG
from .names import count_layers

_REFUSED = {
    "siglip2": "images of varying size (NaFlex)",
    "siglip2_vision_model": "images of varying size (NaFlex)",
    "clip_text_model": "a text model",
    "siglip_text_model": "a text model",
}
_BASE: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "image_size": 224, "patch_size": 16, "hidden_act": "gelu",
    "num_channels": 3, "layer_norm_eps": 1e-12, "qkv_bias": True,
}  # fmt: skip
_BEIT = {
    "use_mean_pooling": True, "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False, "use_shared_relative_position_bias": False,
}  # fmt: skip
_DINOV2 = {"layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {}, "deit": {}, "vit_mae": {}, "beit": _BEIT, "data2vec-vision": _BEIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": {**_DINOV2, "num_register_tokens": 4},
    "dinov3_vit": {
        "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6,
        "layer_norm_eps": 1e-5, "rope_theta": 100.0, "query_bias": True, "key_bias": False,
        "value_bias": True, "proj_bias": True, "mlp_bias": True, "use_gated_mlp": False,
        "num_register_tokens": 0,
    },
    "clip": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True,
    },
}  # fmt: skip
"""model_type → what transformers takes where the file doesn't say: nested ones leave much out."""
SUPPORTED = (*_DEFAULTS, "clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Description:
    """A model but for its number of classes."""

    folder: Path
    kind: str
    """model_type, without ``_vision_model``."""
    fields: Mapping[str, Any]
    """Of a VitSpec."""
    heads: tuple[str, ...] = ("classifier.weight", "cls_classifier.weight")
    """Tensors of which one, where it is there, is the head's."""

    @property
    def embeds(self) -> bool:
        """Whether the head makes an embedding, not classes."""
        return "visual_projection.weight" in self.heads

    @property
    def masked(self) -> bool:
        """Whether it was trained as a masked autoencoder."""
        return self.kind == "vit_mae"

    def make_spec(self, rows: int) -> VitSpec:
        """The spec with a head of so many rows; 0 for none.

        Raises:
            CheckpointError: it can't be; names a field.
        """
        try:
            head = {"classes": 0, "projection" if self.embeds else "classes": rows}
            return decode(VitSpec, {**self.fields, **head})
        except InputError as error:
            raise CheckpointError(f"{self.folder / CONFIG}: {error}") from None


def describe(config: Mapping[str, Any], folder: Path, name: str, tensors: Set[str]) -> Description:
    """What a config and the names of the tensors say.

    Args:
        name: what to call the model; empty: by its model_type.
        tensors: names without the prefix of transformers' class.

    Raises:
        CheckpointError, UnsupportedModelError: see :func:`~.folder.open_folder`.
    """
    kind = _read_kind(config, folder)
    nested = config.get("vision_config") if kind in ("clip", "siglip") else None
    own = nested if isinstance(nested, dict) else config
    told = {key: value for key, value in own.items() if value is not None}
    c: dict[str, Any] = {**_BASE, **_DEFAULTS[kind], **told}
    need = _Need(folder)
    need.act(c["hidden_act"])
    layers, depth = count_layers(tensors), c["num_hidden_layers"]
    if isinstance(depth, int) and 0 < depth != layers:  # before any name is made
        raise CheckpointError(
            f"{folder}: the weights have {layers} layers, not {depth} as {CONFIG} says."
        )
    for key in ("image_size", "patch_size"):
        c[key] = [c[key]] * 2 if isinstance(c[key], int) else c[key]
    fields = {
        "model": name or kind, "image_size": c["image_size"], "patch_size": c["patch_size"],
        "width": c["hidden_size"], "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"], "mlp_width": c["intermediate_size"],
        "channels": c["num_channels"], "eps": c["layer_norm_eps"],
        "activation": ACTIVATIONS[c["hidden_act"]], "qkv_bias": c["qkv_bias"],
    }  # fmt: skip
    more = {"deit": _deit, "dinov2": _dinov2, "dinov2_with_registers": _dinov2,
            "dinov3_vit": _dinov3, "clip": _clip, "siglip": _siglip, "beit": _beit,
            "data2vec-vision": _beit}  # fmt: skip
    try:
        changes, rest = more[kind](c, tensors, need) if kind in more else ({}, {})
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{folder / CONFIG}: a number is missing or none.") from None
    return Description(folder, kind, {**fields, **changes}, **rest)


def _read_kind(config: Mapping[str, Any], folder: Path) -> str:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{folder / CONFIG} has no model_type, nor timm's architecture.")
    if kind in _REFUSED:
        raise UnsupportedModelError(f"{folder} ({kind})", _REFUSED[kind])
    if kind not in SUPPORTED:
        known = f"known are {', '.join(SUPPORTED)}"
        raise UnsupportedModelError(str(folder), f"model_type {kind!r}", known)
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(str(folder), "quantized weights (quantization_config)")
    return kind.removesuffix("_vision_model")


@dataclass(frozen=True)
class _Need:
    """Refuses a model of which something doesn't hold."""

    folder: Path

    def __call__(self, condition: bool, part: str) -> None:
        if not condition:
            raise UnsupportedModelError(str(self.folder), part)

    def act(self, name: Any) -> None:
        self(isinstance(name, str) and name in ACTIVATIONS, f"activation {name!r}")


Parts = tuple[dict[str, Any], dict[str, Any]]
"""Fields of the spec, and of the description."""
Reader = Callable[[Mapping[str, Any], Set[str], _Need], Parts]


def _deit(c: Mapping[str, Any], tensors: Set[str], need: _Need) -> Parts:
    if "cls_classifier.weight" in tensors:
        return {"distilled": True}, {}
    return {"registers": 1}, {}  # its distillation token is there, and nobody reads it


def _beit(c: Mapping[str, Any], tensors: Set[str], need: _Need) -> Parts:
    need("lm_head.weight" not in tensors, "a head that fills in masked patches")
    own, shared = c["use_relative_position_bias"], c["use_shared_relative_position_bias"]
    absolute = bool(c["use_absolute_position_embeddings"])
    need(bool(own or shared or absolute), "a model without positions")
    # transformers takes a table's rows for its columns there, and scales the one to the other.
    square = len(set(c["image_size"])) == len(set(c["patch_size"])) == 1
    need(square or not (own or shared), "relative positions in images that are no square")
    fields: dict[str, Any] = {
        "family": "beit", "qkv_bias": True, "k_bias": False, "positions": absolute,
        "relative": "table" if own or shared else None,
        "layer_scale": any(name.endswith(".lambda_1") for name in tensors),
    }  # fmt: skip
    if c["use_mean_pooling"]:
        fields |= {"pool": "avg", "final_norm": "fc_norm"}
    return fields, {}


def _dinov2(c: Mapping[str, Any], tensors: Set[str], need: _Need) -> Parts:
    hidden = int(c["hidden_size"] * c["mlp_ratio"])
    fields: dict[str, Any] = {"layer_scale": True, "mlp_width": hidden}
    if c["use_swiglu_ffn"]:
        fields |= {"mlp": "packed", "activation": "silu"}
        fields["mlp_width"] = (int(hidden * 2 / 3) + 7) // 8 * 8
    if registers := c.get("num_register_tokens", 0) * (c["model_type"] != "dinov2"):
        fields |= {"registers": registers, "prefix_positions": False}
    if "classifier.weight" in tensors:
        fields["pool"] = "token_avg"
    return fields, {}


def _dinov3(c: Mapping[str, Any], tensors: Set[str], need: _Need) -> Parts:
    need(c["query_bias"] == c["value_bias"], "biases of queries or values only")
    need(c["query_bias"] or not c["key_bias"], "biases of keys only")
    need(c["proj_bias"] == c["mlp_bias"], "biases on some of a layer's projections only")
    gated = bool(c["use_gated_mlp"])
    silu = c["hidden_act"] in ("silu", "swish")
    need(silu or not gated, "an MLP with another gate than SiLU")
    rotary = {"kind": "dinov3", "temperature": c["rope_theta"], "half": True}
    fields = {
        "family": "eva", "rotary": rotary, "positions": False, "layer_scale": True,
        "registers": c["num_register_tokens"], "linear_bias": c["proj_bias"],
        "qkv_bias": c["query_bias"], "k_bias": bool(c["key_bias"] or not c["query_bias"]),
        "mlp": "gated" if gated else "plain",
    }  # fmt: skip
    return fields, {"heads": ()}


def _clip(c: Mapping[str, Any], tensors: Set[str], need: _Need) -> Parts:
    fields: dict[str, Any] = {"pre_norm": True, "patch_bias": False, "qkv_bias": True}
    if "classifier.weight" in tensors:  # of the average, which it doesn't normalise
        return {**fields, "pool": "avg", "final_norm": None}, {}
    if "visual_projection.weight" in tensors:
        fields["head_bias"] = False
        return fields, {"heads": ("visual_projection.weight",)}
    return fields, {}


def _siglip(c: Mapping[str, Any], tensors: Set[str], need: _Need) -> Parts:
    fields: dict[str, Any] = {"class_token": False, "qkv_bias": True}
    if "classifier.weight" in tensors:
        return {**fields, "pool": "avg"}, {}
    need(bool(c["vision_use_head"]), "SigLIP without its attention pooling and without a head")
    pool = {"pool_heads": c["num_attention_heads"], "pool_mlp_width": c["intermediate_size"]}
    return {**fields, "pool": "map", **pool}, {}

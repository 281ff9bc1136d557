"""What timm's ``create_model`` was told beside an architecture's name → changes of its spec."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError, UnsupportedModelError
from ..io.json_codec import decode, encode
from .from_tensors import Shapes, fit_spec
from .huggingface.files import CONFIG
from .spec import ACTIVATIONS, VitSpec

_FIELDS = {
    "img_size": "image_size", "patch_size": "patch_size", "embed_dim": "width", "depth": "depth",
    "num_heads": "heads", "qkv_bias": "qkv_bias", "qk_norm": "qk_norm", "pre_norm": "pre_norm",
    "class_token": "class_token", "reg_tokens": "registers", "global_pool": "pool",
}  # fmt: skip
"""Argument → field of a spec."""
_OTHERS = {
    "act_layer", "no_embed_class",
    # Told by the weights' names and shapes:
    "in_chans", "num_classes", "mlp_ratio", "init_values", "fc_norm", "use_fc_norm", "final_norm",
}  # fmt: skip
_WITHOUT_EFFECT = re.compile(
    r"(?:\w+_)?drop_(?:path_|block_)?rate|dynamic_img_(?:size|pad)|strict_img_size|weight_init"
    r"|fix_init|head_init_scale|scriptable|exportable|no_jit"
)
"""On a trained model that is run at the one size that it is built for."""


def fit_arguments(
    spec: VitSpec, arguments: Mapping[str, Any], shapes: Shapes, folder: Path
) -> VitSpec:
    """The spec of an architecture, changed as the arguments say and the tensors show.

    Raises:
        CheckpointError: the arguments contradict the tensors, or can't be.
        UnsupportedModelError: names an argument that a spec can't express.
    """
    for name in arguments:
        if name not in _OTHERS | _FIELDS.keys() and not _WITHOUT_EFFECT.fullmatch(name):
            raise UnsupportedModelError(str(folder), f"the argument {name} in {CONFIG}")
    changes = {**_read_arguments(spec, arguments, folder), **_read_tensors(shapes, folder)}
    changes |= _read_pool(spec, changes, shapes)
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    depth = arguments.get("depth")
    if isinstance(depth, int) and depth != len(layers):  # before any name is made
        raise CheckpointError(
            f"{folder}: the weights have {len(layers)} layers, not {depth} as {CONFIG} says."
        )
    try:
        changed = decode(VitSpec, {**encode(spec), **changes})
        fitted = fit_spec(changed, shapes)
    except InputError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    if "img_size" in arguments and fitted.image_size != changed.image_size:
        size, other = ("x".join(map(str, s.image_size)) for s in (changed, fitted))
        raise CheckpointError(
            f"{folder}: the weights have positions for images of {other}, not of {size} as "
            f"{CONFIG} says. Correct img_size there."
        )
    return fitted


def _read_arguments(spec: VitSpec, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    changes = {field: given[name] for name, field in _FIELDS.items() if name in given}
    for field in ("image_size", "patch_size"):
        if isinstance(side := changes.get(field), int):
            changes[field] = [side, side]
    pool, activation = changes.get("pool", spec.pool), given.get("act_layer")
    if pool not in ("token", "avg", "map"):
        raise UnsupportedModelError(str(folder), f"pooling {pool!r}")
    if "no_embed_class" in given:
        changes["prefix_positions"] = not given["no_embed_class"]
    if "pre_norm" in given:
        changes["patch_bias"] = not given["pre_norm"]
    if activation is not None:
        if not isinstance(activation, str) or activation not in ACTIVATIONS or spec.mlp != "plain":
            part = f"the argument act_layer {activation!r} in {CONFIG}"
            raise UnsupportedModelError(str(folder), part)
        changes["activation"] = ACTIVATIONS[activation]
    return changes


def _read_tensors(shapes: Shapes, folder: Path) -> dict[str, Any]:
    stem, hidden = (shapes.get(f"{n}.weight", ()) for n in ("patch_embed.proj", "blocks.0.mlp.fc2"))
    if len(stem) != 4 or len(hidden) != 2:  # of another model, as the check of all tensors says
        return {}
    norms = [name for name in ("norm", "fc_norm") if f"{name}.weight" in shapes]
    if len(norms) > 1:
        part = "a norm before the pooling and one after it"
        raise UnsupportedModelError(str(folder), part)
    scales = {"blocks.0.ls1.gamma", "blocks.0.gamma_1"}
    return {
        "channels": stem[1], "mlp_width": hidden[1], "final_norm": norms[0] if norms else None,
        "layer_scale": not scales.isdisjoint(shapes),
    }  # fmt: skip


def _read_pool(spec: VitSpec, changes: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Of attention pooling what makes it, of others that there is none."""
    if changes.get("pool", spec.pool) != "map":
        return {"pool_heads": 0, "pool_mlp_width": 0}
    heads = changes.get("heads", spec.heads)
    kept = spec.pool_heads if spec.pool_heads and "heads" not in changes else heads
    hidden = shapes.get("attn_pool.mlp.fc1.weight") or (spec.pool_mlp_width or spec.mlp_width,)
    return {"pool_heads": kept, "pool_mlp_width": hidden[0]}

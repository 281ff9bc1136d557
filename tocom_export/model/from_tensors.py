"""What a checkpoint's tensors say of a model beyond its name: image size and pooling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError
from .spec import Pool, VitSpec

_POOLS = {"map": "attention", "token_avg": "class token and average, side by side"}
Shapes = Mapping[str, tuple[int, ...]]
"""PyTorch name → shape of a tensor."""


def fit_spec(
    spec: VitSpec,
    shapes: Shapes,
    image_size: tuple[int, int] | None = None,
    pool: Pool | None = None,
) -> VitSpec:
    """The spec of a named model, changed to what a checkpoint of it holds.

    Such models are made by timm's ``create_model(name, img_size=…, global_pool=…)``. Tensors of
    another model change nothing: the checkpoint's own check tells of them.

    Args:
        shapes: of the checkpoint's tensors.
        image_size: height and width, pixels; default: square, by the number of positions.
        pool: default: ``avg`` where there is an ``fc_norm`` in place of ``norm``.

    Raises:
        InputError: the tensors are of another image size, or don't say what they are of.
    """
    return _fit_pool(_fit_size(spec, shapes, image_size), shapes, pool)


def format_size(size: tuple[int, int]) -> str:
    """Height and width as people write them: ``224x224``."""
    return "x".join(map(str, size))


def _fit_size(spec: VitSpec, shapes: Shapes, given: tuple[int, int] | None) -> VitSpec:
    resized = spec if given is None else replace(spec, image_size=given)
    patches = _count_patches(spec, shapes)
    if patches in (None, resized.patches):
        return resized
    side = math.isqrt(patches)
    square = (side * spec.patch_size[0], side * spec.patch_size[1])
    of = f"the weights have positions for {patches} patches"
    if given is not None:
        fits = f", images of {format_size(square)}" if side * side == patches else ""
        raise InputError(
            f"`image_size` {format_size(given)} is {resized.patches} patches, but {of}{fits}. "
            "They are not resampled here; finetune does that."
        )
    if side * side != patches:
        raise InputError(f"{of}, which are no square: `image_size` HxW says of which images.")
    return replace(spec, image_size=square)


def _count_patches(spec: VitSpec, shapes: Shapes) -> int | None:
    """How many patches the positions are for; None where the tensors are of another model."""
    tokens = {"cls_token": spec.class_token, "dist_token": spec.distilled,
              "reg_token": bool(spec.registers)}  # fmt: skip
    positions = shapes.get("pos_embed", ())
    if len(positions) != 3 or any((name in shapes) != has for name, has in tokens.items()):
        return None
    return positions[1] - (spec.prefix if spec.prefix_positions else 0)


def _fit_pool(spec: VitSpec, shapes: Shapes, given: Pool | None) -> VitSpec:
    if given is not None and spec.pool not in ("token", "avg", given):
        raise InputError(
            f"`pool` {given}: {spec.model} pools by {_POOLS[spec.pool]}, for which its weights are "
            "made; leave `pool` out."
        )
    norms = [name for name in ("norm", "fc_norm") if f"{name}.weight" in shapes]
    norm: Any = norms[0] if len(norms) == 1 else spec.final_norm
    if given is None and (spec.final_norm, norm) == ("fc_norm", "norm"):
        raise InputError(
            f"{spec.model} has an fc_norm, but the weights have a norm in its place: `pool` says "
            "whether the class token is read (token) or the average (avg)."
        )
    averages = norm == "fc_norm" != spec.final_norm
    return replace(spec, pool=given or ("avg" if averages else spec.pool), final_norm=norm)

"""What a checkpoint's tensors say of a model beyond its name: image size and pooling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError
from .resizing import list_positions
from .spec import MOST_PATCHES, Pool, VitSpec

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
        image_size: see :func:`find_image_size`; the weights may be of another.
        pool: default: ``avg`` where there is an ``fc_norm`` in place of ``norm``.

    Raises:
        InputError: the tensors don't say what they are of.
    """
    size = find_image_size(spec, shapes, image_size)
    if size is None:
        raise InputError(_explain_size(spec, shapes, image_size))
    return _fit_pool(replace(spec, image_size=size), shapes, pool)


def find_image_size(
    spec: VitSpec, shapes: Shapes, asked: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """The images that a checkpoint's positions are for; None where nothing says that.

    Those of the named model where it has as many positions, as in timm; else those that are asked
    for; else a square.

    Args:
        asked: height and width, pixels, of the images that the model is to run on.
    """
    found: tuple[int, int] | None = spec.image_size
    if (name := _name_positions(spec, shapes)) is not None:
        sizes = (
            spec.image_size,
            asked and _fill(spec, asked),
            _find_square(spec, name, shapes[name]),
        )
        fits = (s for s in sizes if s and _shape_at(spec, name, s) == shapes[name])
        found = next(fits, None)
    return found


def format_size(size: tuple[int, int]) -> str:
    """Height and width as people write them: ``224x224``."""
    return "x".join(map(str, size))


def _name_positions(spec: VitSpec, shapes: Shapes) -> str | None:
    """A tensor that says the number of patches; None where it is of another model, or none does."""
    tokens = {"cls_token": spec.class_token, "dist_token": spec.distilled,
              "reg_token": bool(spec.registers)}  # fmt: skip
    name = next(iter(list_positions(spec)), "")
    found, wanted = shapes.get(name, ()), spec.weights().get(name, ())
    same = len(found) == len(wanted) > 0 and found[-1] == wanted[-1]
    if not same or any((token in shapes) != has for token, has in tokens.items()):
        return None
    return name


def _grid_of(spec: VitSpec, size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // spec.patch_size[0], size[1] // spec.patch_size[1]


def _fill(spec: VitSpec, size: tuple[int, int]) -> tuple[int, int]:
    """What patches fill of an image."""
    height, width = _grid_of(spec, size)
    return height * spec.patch_size[0], width * spec.patch_size[1]


def _shape_at(spec: VitSpec, name: str, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of a tensor at another image size; empty where no patch fits, or too many do."""
    height, width = _grid_of(spec, size)
    if min(height, width) < 1 or height * width > MOST_PATCHES:
        return ()
    return replace(spec, image_size=size).weights()[name]


def _count(spec: VitSpec, name: str, shape: tuple[int, ...]) -> int:
    """Patches, or distances of two patches, that a tensor is for."""
    if name == "pos_embed":
        return shape[1] - (spec.prefix if spec.prefix_positions else 0)
    return shape[0] - 3 * bool(spec.prefix)


def _find_square(spec: VitSpec, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    side = math.isqrt(max(_count(spec, name, shape), 0))
    side = side if name == "pos_embed" else (side + 1) // 2
    return side * spec.patch_size[0], side * spec.patch_size[1]


def _explain_size(spec: VitSpec, shapes: Shapes, asked: tuple[int, int] | None) -> str:
    """Why nothing says what images the weights are of, and what to do."""
    name = list_positions(spec)[0]
    count = _count(spec, name, shapes[name])
    what = f"{count} patches" if name == "pos_embed" else f"{count} distances of two patches"
    of = f"the weights have positions for {what}, which are no square"
    if asked is None:
        return f"{of}: `image_size` HxW says of which images."
    return (
        f"{of}, nor images of {format_size(asked)}: `image_size` HxW says of which images. To "
        "resample them, build at that size, then again of the bundle's weights.safetensors."
    )


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

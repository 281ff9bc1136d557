"""Options that say which weights are meant, and what model they are of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import FILE, F, FiniteFloat, add_options
from .output import Output

if TYPE_CHECKING:
    from tocom_export.loading import Model


class ImageSize(click.ParamType[tuple[int, int]]):
    """Pixels: ``224``, or height and width, ``224x448``."""

    name = "N|HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", value, re.ASCII)
        height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not height or not width:
            self.fail(f"{value!r} is no image size; write 224, or 224x448 (height x width).")
        return height, width


class Channels(click.ParamType[tuple[float, ...]]):
    """A number for each channel, ``0.485,0.456,0.406``, or one for all."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(FiniteFloat().convert(part, param, ctx) for part in value.split(","))


weights_key_option = click.option(
    "--weights-key",
    metavar="NAME",
    help="Entry of a pickled --checkpoint that is taken; default: as timm, averaged weights "
    "(state_dict_ema, model_ema) where there are any, else state_dict or model.",
)


def checkpoint_options(what: str) -> Callable[[F], F]:
    """``--checkpoint`` and ``--weights-key``.

    Args:
        what: help of the former.
    """
    option = click.option("--checkpoint", type=FILE, metavar="FILE|FOLDER", help=what)
    return add_options(option, weights_key_option)


pool_option = click.option(
    "--pool",
    type=click.Choice(["token", "avg"]),
    help="What the model's head reads; default: by the weights' last norm (fc_norm: avg).",
)
form_options = add_options(
    click.option(
        "--image-size",
        type=ImageSize(),
        metavar=ImageSize.name,
        help="Of the images, pixels; positions of weights for another size are resampled, as timm "
        "does. Default: what the weights are for, by their file or their positions.",
    ),
    pool_option,
)


def open_model(
    model: str | None, checkpoint: Path | None, options: Mapping[str, Any], output: Output
) -> Model:
    """The model that is to be trained, and a note where a file has other weights, too."""
    from tocom_export.loading import load_model

    names = ("weights_key", "image_size", "pool")
    given = {name: options[name] for name in names if name in options}
    loaded = load_model(model, checkpoint, **given)
    for line in filter(None, (loaded.checkpoint.note, loaded.resampled)):
        output.note(line)
    return loaded

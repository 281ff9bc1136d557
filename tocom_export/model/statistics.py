"""The image statistics that are asked for, and a line on where the chosen ones come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError
from .preprocess import Preprocess


def choose_statistics(
    known: Preprocess,
    origin: str,
    channels: int,
    *,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> tuple[Preprocess, str]:
    """Image statistics with those changed that are given, and one line for people about them.

    Args:
        known: what holds otherwise.
        origin: where that is from.
        channels: of the model's images.
        mean: of each channel, or one for all; of pixels from 0 to 1. ``std`` likewise.

    Raises:
        InputError: a value can't be.
    """
    given: dict[str, Any] = {
        "crop_pct": crop_pct, "interpolation": interpolation,
        "mean": _spread("mean", mean, channels), "std": _spread("std", std, channels),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    try:
        chosen = replace(known, **given)
    except InputError as error:
        raise InputError(f"{', '.join(f'`{name}`' for name in given)}: {error}") from None
    if max(chosen.mean) > 1 or max(chosen.std) > 1:
        raise InputError("`mean` and `std` are of pixels from 0 to 1: divide those of 0 to 255.")
    names = ", ".join(f"`{name}`" for name in sorted(given))
    origin = f"{origin}, but {names} as given" if given else origin
    return chosen, f"Image statistics: {format_statistics(chosen)} ({origin})."


def _spread(
    name: str, values: Sequence[float] | float | None, channels: int
) -> tuple[float, ...] | None:
    """A value for each channel."""
    if values is None:
        return None
    each = (values,) if isinstance(values, (int, float)) else tuple(values)
    each = each * channels if len(each) == 1 else each
    if len(each) != channels:
        raise InputError(f"`{name}` has {len(each)} values, but images have {channels} channels.")
    return tuple(map(float, each))


def format_statistics(known: Preprocess) -> str:
    """All of them in one line."""
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (known.mean, known.std))
    crop = f"crop {known.crop_pct:g} ({known.crop_mode})"
    return f"mean {mean}, std {std}, {crop}, {known.interpolation}"

"""Image statistics that are given, and what is said of the chosen ones."""

from __future__ import annotations

from typing import Any

import pytest

from tocom_export.errors import InputError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.statistics import choose_statistics

KNOWN = Preprocess((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 0.9, "bilinear")


def test_nothing_given():
    chosen, told = choose_statistics(KNOWN, "timm's for a_vit", 3)
    assert chosen == KNOWN
    assert told == (
        "Image statistics: mean 0.5 0.4 0.3, std 0.2 0.2 0.2, crop 0.9 (center), bilinear (timm's "
        "for a_vit)."
    )


@pytest.mark.parametrize(
    ("given", "changed", "named"),
    [
        ({"mean": 0.5}, {"mean": (0.5, 0.5, 0.5)}, "`mean`"),
        ({"mean": [0.5], "std": (0.1, 0.2, 0.3)}, {"mean": (0.5,) * 3, "std": (0.1, 0.2, 0.3)},
         "`mean`, `std`"),
        ({"crop_pct": 0.95}, {"crop_pct": 0.95}, "`crop_pct`"),
        ({"crop_pct": 1, "interpolation": "bicubic"}, {"crop_pct": 1, "interpolation": "bicubic"},
         "`crop_pct`, `interpolation`"),
    ],
)  # fmt: skip
def test_what_is_given_is_taken(given: dict[str, Any], changed: dict[str, Any], named: str):
    chosen, told = choose_statistics(KNOWN, "its metadata", 3, **given)
    for name in ("mean", "std", "crop_pct", "interpolation", "crop_mode"):
        assert getattr(chosen, name) == changed.get(name, getattr(KNOWN, name))
    assert told.endswith(f"(its metadata, but {named} as given).")


def test_one_channel():
    chosen, _ = choose_statistics(Preprocess((0.5,), (0.5,)), "", 1, mean=0.1, std=[0.3])
    assert (chosen.mean, chosen.std) == ((0.1,), (0.3,))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mean": (0.1, 0.2)}, "`mean` has 2 values, but images have 3 channels"),
        ({"std": (0.1,) * 4}, "`std` has 4 values"),
        ({"std": 0}, "`std`: image statistics can't be"),
        ({"mean": float("nan")}, "`mean`: image statistics can't be"),
        ({"crop_pct": 1.5}, "`crop_pct`: image statistics can't be"),
        ({"interpolation": "nearest"}, "`interpolation`: image statistics can't be"),
    ],
)
def test_values_that_can_t_be(given: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        choose_statistics(KNOWN, "", 3, **given)

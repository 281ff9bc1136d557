"""The models known by name without timm, and the one that ships with the package."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UnknownModelError, UnsupportedModelError
from ..io.json_codec import decode, parse_json
from .preprocess import Preprocess
from .spec import VitSpec

ASSETS = Path(__file__).parents[1] / "assets"
REFERENCE = "reference"
REFERENCE_CHECKPOINT = ASSETS / "reference.safetensors"
REFERENCE_BANKS = {
    "tome": ASSETS / "reference-bank.safetensors",
    "evit": ASSETS / "reference-evit-bank.safetensors",
}
"""Method → the reference model's bank."""


REFERENCE_ACCURACY = {
    "tome": {0: 31.01, 4: 30.92, 8: 30.48, 12: 29.92, 16: 28.59},
    "evit": {0: 31.01, 4: 29.89, 8: 28.38, 12: 27.11, 16: 24.66},
}
"""Method → degree of all layers → top-1 accuracy in percent of the reference model.

From source 0 with its bank at the scale 0.1, in float32, on the 10,000 validation images of
Tiny-ImageNet (benchmarks/precision.py).
"""


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = parse_json((ASSETS / "models.json").read_bytes())
    return table


@cache
def _unsupported() -> dict[str, str]:
    """A timm model's name → the part of it that a spec can't express."""
    known = parse_json((ASSETS / "unsupported_models.json").read_bytes())
    classes: dict[str, dict[str, dict[str, int]]] = known["classes"]  # part → name → weights of it
    return {
        name: part for parts in classes.values() for part, names in parts.items() for name in names
    }


def is_known(name: str) -> bool:
    """Whether :func:`known_model` has a timm model of that name."""
    return name.split(".")[0] in _table()


def known_model(name: str) -> tuple[VitSpec, Preprocess]:
    """The spec and image statistics of a timm model, by its name or ``name.tag``.

    Raises:
        UnsupportedModelError: a model of timm's that a spec can't express.
        UnknownModelError: no such name; suggests near ones.
    """
    architecture, _, tag = name.partition(".")
    entry = _table().get(architecture)
    if entry is None:
        if part := _unsupported().get(architecture):
            raise UnsupportedModelError(architecture, part)
        near = difflib.get_close_matches(architecture, [*_table(), REFERENCE], 3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UnknownModelError(f"`model` {name}: no model of that name is known.{hint}")
    spec = decode(VitSpec, {"model": architecture, **entry["spec"]})
    statistics = {**entry["preprocess"], **entry["tags"].get(tag, {})}
    return spec, decode(Preprocess, statistics)

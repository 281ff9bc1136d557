"""What a weights file says of itself, in its safetensors metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import InputError
from ..io.json_codec import decode, encode, parse_json
from ..model.preprocess import Preprocess
from ..model.spec import VitSpec
from .method import Method
from .schedule import Degree

T = TypeVar("T")
METADATA_KEY = "tocom_export"
"""The one metadata key we write: a single key keeps a safetensors file reproducible."""


@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint knows beyond its weights; None where it doesn't say."""

    spec: VitSpec | None = None
    source: Degree | None = None
    """The degree that the weights were trained at."""
    method: Method | None = None
    classes: tuple[str, ...] | None = None
    """Name of each class."""
    preprocess: Preprocess | None = None
    variant: str | None = None
    """The variant of a bundle that the file holds the own weights of."""


def to_metadata(record: Any) -> dict[str, str]:
    """A record as safetensors metadata."""
    return {METADATA_KEY: json.dumps(encode(record), sort_keys=True)}


def from_metadata(kind: type[T], metadata: Mapping[str, str]) -> T:
    """The inverse of :func:`to_metadata`; where the key is absent, a record that says nothing.

    Raises:
        InputError: the key is there and doesn't hold what we write, or must be there.
    """
    try:
        return decode(kind, parse_json(metadata.get(METADATA_KEY, "{}")))
    except InputError as error:
        raise InputError(f"its metadata {METADATA_KEY!r}: {error}") from None

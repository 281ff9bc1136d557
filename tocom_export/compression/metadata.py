"""What a weights file says of itself, in its safetensors metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..model.preprocess import Preprocess
from ..model.spec import VitSpec
from .method import Method
from .schedule import MAX_DEGREE

METADATA_KEY = "tocom_export"
"""The one metadata key we write: a single key keeps a safetensors file reproducible."""


@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint knows beyond its weights; None where it doesn't say."""

    spec: VitSpec | None = None
    source: int | None = None
    """The degree that the weights were trained at."""
    method: Method | None = None
    classes: tuple[str, ...] | None = None
    """Name of each class."""
    preprocess: Preprocess | None = None

    def to_metadata(self) -> dict[str, str]:
        """As safetensors metadata."""
        data: dict[str, Any] = {}
        if self.spec:
            data["spec"] = self.spec.to_json()
        if self.source is not None:
            data["source"] = self.source
        if self.method:
            data["method"] = self.method.name
            data["proportional"] = self.method.proportional
        if self.classes:
            data["classes"] = list(self.classes)
        if self.preprocess:
            data["preprocess"] = self.preprocess.to_json()
        return {METADATA_KEY: json.dumps(data, sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelInfo:
        """The inverse of :meth:`to_metadata`; empty where the key is absent.

        Raises:
            InputError: the key is there and doesn't hold what we write.
        """
        if METADATA_KEY not in metadata:
            return cls()
        try:
            data = json.loads(metadata[METADATA_KEY])
            source = data.get("source")
            if source is not None and not (type(source) is int and 0 <= source <= MAX_DEGREE):
                raise ValueError
            method, classes = data.get("method"), data.get("classes")
            if classes is not None and not isinstance(classes, list):
                raise ValueError
            spec, preprocess = data.get("spec"), data.get("preprocess")
            return cls(
                spec=VitSpec.from_json(spec) if spec else None,
                source=source,
                method=Method(method, bool(data.get("proportional", True))) if method else None,
                classes=tuple(map(str, classes)) if classes else None,
                preprocess=Preprocess.from_json(preprocess) if preprocess else None,
            )
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
            raise InputError(f"its metadata {METADATA_KEY!r} can't be understood.") from None

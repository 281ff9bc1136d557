"""What a bundle's manifest says."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from ..compression.method import Method
from ..errors import InputError
from ..graph.precision import Precision
from ..io.json_codec import LATER, format_json
from ..model.outputs import DENSE, Form, OutputName, check_method, list_forms
from ..model.preprocess import Preprocess
from ..model.spec import VitSpec
from ..model.weight_names import HEADS, POOLING
from ..variant import Variant
from .file_hashes import FileRecord

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FORMAT = 2
LARGEST = 10_000_000
"""Bytes of a manifest."""


_UNSEALED = "0" * 64
_END = re.compile(rb'  "sha256": "([0-9a-f]{64})"\n}\n\Z')


def seal(data: dict[str, Any]) -> str:
    """A manifest's text, with the SHA-256 of itself (where that stands: zeros) at its end."""
    others = {name: value for name, value in data.items() if name != "sha256"}
    text = format_json({**others, "sha256": _UNSEALED})
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(f'"{_UNSEALED}"\n}}\n', f'"{digest}"\n}}\n')


def is_sealed(content: bytes) -> bool:
    """Whether a manifest's text is what :func:`seal` made, to the byte."""
    found = _END.search(content)
    if not found:
        return False
    blank = content[: found.start(1)] + _UNSEALED.encode() + content[found.end(1) :]
    return hashlib.sha256(blank).hexdigest().encode() == found[1]


def graph_name(variant: str) -> str:
    """File name of a variant's graph."""
    return f"{variant}.onnx"


def weights_name(variant: str) -> str:
    """File name of the tensors in which a variant differs."""
    return f"{variant}.safetensors"


def plan_name(variant: str) -> str:
    """File name of a variant's plan; what it is stands in ``<name>.json``."""
    return f"{variant}.plan"


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Raises:
        InputError: fields contradict each other.
    """

    spec: VitSpec
    method: Method
    precision: Precision
    variants: Mapping[str, Variant]
    """By their names."""
    files: Mapping[str, FileRecord]
    preprocess: Preprocess
    tools: Mapping[str, str]
    """Version of each tool that wrote it."""
    classes: tuple[str, ...] | None = None
    plans: tuple[str, ...] = ()
    """Variants that have a TensorRT plan, which lies with its own record beside the graph."""
    bank: str | None = None
    """SHA-256 of the bank that its variants were last compensated with, by its values."""
    refitted: tuple[str, ...] = ()
    """Variants whose weights were exchanged since the bundle was built."""
    accuracy: Mapping[str, Annotated[float, Meta(ge=0, le=100)]] = field(default_factory=dict)
    """Top-1 accuracy in percent of the variants where it was measured (``evaluate --record``); by
    the nearest neighbours where there are no logits."""
    outputs: tuple[OutputName, ...] = field(default=("logits",), metadata=LATER)
    """What its engines give, in their order. Bundles of models without a head that were written
    before this field call their embedding logits."""
    unit_embedding: bool = field(default=False, metadata=LATER)
    """Whether embeddings are of length 1."""

    def __post_init__(self) -> None:
        for name in self.files:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise InputError(f"{name!r} is not a plain file name.")
        if not self.variants:
            raise InputError("variants: there is none.")
        for name, variant in self.variants.items():
            if variant.name != name:
                raise InputError(f"variants: {name} calls itself {variant.name}.")
            variant.check(self.spec)
            if variant.merge != self.method.merge:
                raise InputError(f"variants: {name} merges otherwise than the method.")
        for name in (WEIGHTS, *map(graph_name, self.variants)):
            if name not in self.files:
                raise InputError(f"files: {name} is not listed.")
        if self.classes is not None and len(self.classes) != self.spec.classes:
            raise InputError(f"classes: {len(self.classes)} names of {self.spec.classes} classes.")
        if unknown := {*self.plans, *self.refitted, *self.accuracy} - {*self.variants}:
            raise InputError(f"{min(unknown)} is no variant.")
        if not self.outputs or len({*self.outputs}) != len(self.outputs):
            raise InputError("outputs: there is none, or one twice.")
        check_method(self.outputs, self.method)

    @property
    def forms(self) -> dict[str, Form]:
        """Shape and type of each output."""
        return list_forms(self.spec, self.outputs)

    @property
    def has_logits(self) -> bool:
        """Whether its engines name classes."""
        return bool(self.spec.classes) and "logits" in self.outputs

    def reads(self, weight: str) -> bool:
        """Whether its graphs read a weight.

        Without logits they leave out classifiers, without an embedding all behind the tokens.
        """
        pooled = bool({*self.outputs} - {*DENSE})
        headed = "logits" in self.outputs or (bool(self.spec.projection) and pooled)
        return (headed or not weight.startswith(HEADS)) and (
            pooled or not weight.startswith(POOLING)
        )

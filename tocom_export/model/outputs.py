"""What an engine can give of images: its outputs' names, and the form that each has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from ..errors import InputError
from .spec import VitSpec

if TYPE_CHECKING:
    from ..compression.method import Method

OutputName = Literal["logits", "embedding", "tokens", "map"]
OUTPUTS: tuple[OutputName, ...] = get_args(OutputName)
DType = Literal["float32", "int32"]


@dataclass(frozen=True)
class Form:
    """What one image has of an output."""

    shape: tuple[int, ...]
    dtype: DType = "float32"


FORMS: Mapping[OutputName, Callable[[VitSpec], Form]] = {
    # Of a model without a head, bundles that were written before embeddings had a name.
    "logits": lambda spec: Form((spec.outputs,)),
    "embedding": lambda spec: Form((spec.embedding,)),
    "tokens": lambda spec: Form((spec.patches, spec.width)),
    "map": lambda spec: Form((spec.patches,), "int32"),
}
DENSE: tuple[OutputName, ...] = ("tokens", "map")
"""Those that have something of each patch; of all others the head is read."""


def list_forms(spec: VitSpec, names: Iterable[OutputName]) -> dict[str, Form]:
    """The form of some outputs of a model, by their names, in their order."""
    return {name: FORMS[name](spec) for name in names}


def pluralise(name: str) -> str:
    """What several of an output are called: ``logits``, ``embeddings``."""
    return name if name.endswith("s") else f"{name}s"


def format_outputs(forms: Mapping[str, Form], unit_embedding: bool) -> str:
    """``logits (10), embedding (64, of length 1)``."""
    told = []
    for name, form in forms.items():
        unit = ", of length 1" if unit_embedding and name == "embedding" else ""
        told.append(f"{name} ({' × '.join(map(str, form.shape))}{unit})")
    return ", ".join(told)


def choose_outputs(spec: VitSpec, asked: Iterable[str] | str = ()) -> tuple[OutputName, ...]:
    """The outputs that are asked for, each once, or by one name; none is what a model is for.

    That is logits where it has classes, else the embedding.

    Raises:
        InputError: there is no such output, or the model has none.
    """
    names = tuple(dict.fromkeys((asked,) if isinstance(asked, str) else asked))
    if unknown := [name for name in names if name not in OUTPUTS]:
        raise InputError(f"`outputs` {unknown[0]!r}: it is {', '.join(OUTPUTS)}.")
    if "logits" in names and not spec.classes:
        raise InputError(
            f"`outputs` logits: {spec.model} has no head that gives them; ask for embedding."
        )
    if names == ("map",):
        raise InputError("`outputs` map alone: ask for what else the engine is to give, too.")
    return cast(tuple[OutputName, ...], names or ("logits" if spec.classes else "embedding",))


def check_method(names: Iterable[OutputName], method: Method) -> None:
    """Raise InputError where a method leaves nothing to give."""
    if "tokens" in names and method.name == "evit":
        raise InputError(
            "`outputs` tokens: evit drops patches, of which no features are left; ask for the "
            "method tome."
        )
    if "map" in names and method.merge == "ffn":
        raise InputError("`outputs` map: with `merge` ffn each patch keeps a token of its own.")

"""What is evaluated: one trained model and some variants of it, whatever runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..bundle.file_hashes import FileRecord
from ..compression.method import Method
from ..errors import DataError, InputError
from ..graph.precision import Precision
from ..model.preprocess import Preprocess
from ..model.spec import VitSpec
from ..variant import Variant
from .accuracy import Run


class Batches(Protocol):
    """Labelled images, prepared for a model, as often as they are asked for."""

    name: str
    """Where they come from."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""

    def __len__(self) -> int:
        """Number of batches."""

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Images (B, C, H, W) float32 and labels (B,), as tensors or arrays."""


class Oracle(Protocol):
    """The PyTorch model of a bundle, to hold the accuracy of its engines against."""

    def runner(self, variant: Variant) -> Run:
        """One variant's run."""

    def stored_as(self, variant: Variant) -> Precision:
        """What its weights for a variant were rounded to; ``fp32`` is not at all."""


@dataclass(frozen=True)
class Subject:
    """A bundle or a checkpoint, ready to be run.

    Raises:
        InputError: two variants have the same name.
    """

    path: Path
    spec: VitSpec
    preprocess: Preprocess
    classes: tuple[str, ...] | None
    method: Method
    variants: tuple[Variant, ...]
    runner: Callable[[Variant], Run]
    """One of the variants → its run, which gives logits or embeddings; it may be asked for without
    compensation, too."""
    backend: str
    precision: Precision = "fp32"
    baked: bool = False
    """Whether scales are part of the weights, as a bundle's are, and can't be chosen."""
    oracle: Oracle | None = None
    """Of engines."""
    files: Mapping[str, FileRecord] | None = None
    """What a bundle's files were when it was opened; None of a checkpoint."""

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{twice[0]} is asked for twice; choose another name.")

    def check_classes(self, names: Sequence[str], data: str) -> None:
        """See :func:`check_classes`."""
        check_classes(names, data, self.spec, self.classes, self.path)


def check_classes(
    names: Sequence[str], data: str, spec: VitSpec, own: Sequence[str] | None, path: Path
) -> None:
    """Raise DataError, which calls the data set so, where its classes are not a model's.

    Args:
        own: the names of the model's classes, where they are known.
        path: what to call the model.
    """
    if not spec.classes:
        raise DataError(
            f"{path} has no head that names classes; evaluate --knn measures its embedding."
        )
    if len(names) != spec.classes:
        raise DataError(
            f"{data} has {len(names)} classes, but {path} has a head of {spec.classes}."
        )
    if own and tuple(own) != tuple(names):
        ours, theirs = next(p for p in zip(own, names, strict=True) if p[0] != p[1])
        raise DataError(
            f"{data} has a class {theirs!r} where {path} has {ours!r}; classes must have the same "
            "names in the same order."
        )


def check_subjects(
    subjects: Sequence[Subject],
    data: str,
    held_out: str | None = None,
    *,
    scaled: bool = False,
    heads: bool = True,
) -> None:
    """Raise InputError where subjects don't take the same images, or these not their purpose.

    Args:
        data: name of the images that are measured.
        held_out: of those that scales are chosen on.
        scaled: whether a scale is chosen for them; one of a bundle is baked in.
        heads: whether their heads name the classes, and so have to be of the same ones.
    """
    first = subjects[0]
    for subject in subjects:
        same = (subject.spec.image_size, subject.preprocess, heads and subject.spec.classes)
        if same != (first.spec.image_size, first.preprocess, heads and first.spec.classes):
            raise InputError(
                f"{subject.path} and {first.path} differ in image size, image statistics or "
                "classes; evaluate them one at a time."
            )
        if subject.baked and scaled:
            raise InputError(f"`scale`: the engines of {subject.path} have theirs baked in.")
    if held_out and Path(held_out).resolve() == Path(data).resolve():
        raise InputError(
            "`held_out` is the same as `data`: the scale would be chosen on the images that it is "
            "judged by. Name others, such as some of the training split."
        )

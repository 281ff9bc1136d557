"""What other weights an engine is to get, checked against what it is now."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

from .bundle.weights import ModelWeights, check_same_model, recover_checkpoint
from .compression.checkpoint import Checkpoint
from .compression.method import Method
from .graph.precision import Precision
from .loading import load_bank
from .model.spec import VitSpec
from .variant import Variant


class Refittable(Protocol):
    """A bundle, or what is written beside a plan."""

    @property
    def spec(self) -> VitSpec:
        """The model."""

    @property
    def method(self) -> Method:
        """How it reduces tokens."""

    @property
    def precision(self) -> Precision:
        """Of its weights."""


def prepare_refit(
    now: Refittable,
    present: Variant,
    own: Path,
    *,
    checkpoint: Path | None = None,
    bank: Path | str | None = None,
    source: int | None = None,
    scale: float | None = None,
) -> tuple[ModelWeights, Variant]:
    """The weights that are asked for, and the variant that they make of the present one.

    Args:
        present: whose source and scale hold where neither the arguments nor the file name one.
        own: the weights file that the engine was made of, where ``checkpoint`` is None.
        bank: a bank's file, or ``none``; default: none for a variant that has none, for the model
            inside the package its own.

    Raises:
        BankError, CheckpointError: one is missing, broken, or of another model.
        DegreeError, InputError: source or scale is out of range.
    """
    if checkpoint:
        opened = Checkpoint.open(checkpoint)
        source = opened.choose_source(source, present.source)
    else:
        opened = recover_checkpoint(Checkpoint.open(own), now.spec, now.precision)
        source = present.source if source is None else source
    if bank is None and not present.compensated:
        bank = "none"
    steps = load_bank(bank, now.spec, now.method)
    check_same_model(opened, now.spec)
    variant = dataclasses.replace(
        present,
        source=source,
        scale=present.scale if scale is None else scale,
        compensated=steps is not None,
    )
    return ModelWeights(now.spec, opened, steps, now.precision), variant

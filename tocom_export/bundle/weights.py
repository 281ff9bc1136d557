"""The weights of a bundle's variants: those they share, and those in which each differs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..compression.bake import bake
from ..compression.bank import ToComBank
from ..compression.checkpoint import Checkpoint
from ..errors import CheckpointError
from ..graph.precision import Precision
from ..graph.quantising import quantized_layers, stored_form
from ..io.tensors import Tensors
from ..model.catalogue import REFERENCE, REFERENCE_CHECKPOINT
from ..model.spec import VitSpec
from ..variant import Variant


@dataclass(frozen=True)
class ModelWeights:
    """What the weights of all variants are made of.

    ``spec`` is the one that :meth:`Checkpoint.check` returned for ``checkpoint``.
    """

    spec: VitSpec
    checkpoint: Checkpoint
    bank: ToComBank | None
    """None compensates nothing."""
    precision: Precision = "fp32"

    def shared(self) -> dict[str, npt.NDArray[Any]]:
        """The checkpoint's tensors, in the precision's types.

        Raises:
            CheckpointError: a value is beyond the type's range.
        """
        tensors = {name: self.checkpoint.tensors[name] for name in self.spec.weights()}
        return self._store(tensors)

    def own(self, variant: Variant) -> dict[str, npt.NDArray[Any]]:
        """Those that differ in a variant, absolute values; none where nothing is compensated.

        Raises:
            BankError, CheckpointError: a value is beyond the type's range.
        """
        if self.bank is None or not self.needs_own(variant):
            return {}
        return self._store(bake(self.checkpoint.tensors, self.spec, self.bank, variant))

    def needs_own(self, variant: Variant) -> bool:
        """Whether a variant has weights that differ."""
        return self.bank is not None and variant.baked

    def _store(self, tensors: Tensors) -> dict[str, npt.NDArray[Any]]:
        return stored_form(tensors, self.precision, quantized_layers(self.spec))


def check_same_model(checkpoint: Checkpoint, spec: VitSpec) -> None:
    """Raise CheckpointError where a checkpoint can't take the place of a bundle's."""
    found, told = checkpoint.check(spec), checkpoint.info.spec
    for field in dataclasses.fields(spec) if told else ():
        here, there = getattr(told, field.name), getattr(spec, field.name)
        if here != there and field.name not in ("model", "classes", "projection"):
            raise CheckpointError(
                f"{checkpoint.file} has {field.name} {here}, the bundle {there}; build a bundle of "
                "it."
            )
    if found != spec:
        what = "channels of an embedding" if spec.projection else "classes"
        here, there = (s.projection if spec.projection else s.classes for s in (found, spec))
        raise CheckpointError(
            f"{checkpoint.file} has {here} {what}, the bundle {there}; build a bundle of it."
        )


def recover_checkpoint(own: Checkpoint, spec: VitSpec, precision: Precision) -> Checkpoint:
    """The checkpoint that a bundle was made of, as far as it is at hand: for a refit without one.

    A bundle's own weights are rounded to its precision. Those of the model inside the package
    are the rounded ones of a file that is always there.

    Args:
        own: the bundle's shared weights.
    """
    if precision == "fp32" or spec.model != REFERENCE:
        return own
    shipped = Checkpoint.open(REFERENCE_CHECKPOINT)
    tensors = {name: shipped.tensors[name] for name in spec.weights() if name in shipped.tensors}
    rounded = stored_form(tensors, precision, quantized_layers(spec))
    same = rounded.keys() == own.tensors.keys() and all(
        np.array_equal(tensor, own.tensors[name]) for name, tensor in rounded.items()
    )
    return shipped if same else own

"""Compensated weights: a checkpoint's, plus the bank's gap from source to target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BankError
from ..io.tensors import is_finite
from ..model.spec import VitSpec
from ..variant import Variant
from .bank import ToComBank

Array = npt.NDArray[Any]


def qkv_name(layer: int) -> str:
    """The one tensor of a layer that a bank changes."""
    return f"blocks.{layer}.attn.qkv.weight"


def bake(
    tensors: Mapping[str, Array], spec: VitSpec, bank: ToComBank, variant: Variant
) -> dict[str, Array]:
    """The tensors that differ in a variant: the fused qkv weight (3C, C) of every layer.

    Rows 0..C-1 are the query's and gain Δq, rows 2C..3C-1 the value's and gain Δv; the key's
    rows are the checkpoint's. Each layer gains what its own target asks for. Summed in float64,
    then rounded once to float32. The values are absolute: nothing about a former degree is left
    in them.

    Raises:
        BankError: a sum is beyond float32's range.
    """
    width = spec.width
    baked = {}
    for layer, target in enumerate(variant.targets):
        name = qkv_name(layer)
        original = tensors[name]
        gap_q, gap_v = bank.gap(layer, variant.source, target, variant.scale)
        merged = original.astype(np.float32)
        with np.errstate(over="ignore"):
            merged[:width] = (original[:width] + gap_q).astype(np.float32)
            merged[2 * width :] = (original[2 * width :] + gap_v).astype(np.float32)
        if not is_finite(merged):
            raise BankError(
                f"`scale` {variant.scale:g} takes {name} beyond float32's range; choose a smaller "
                "one."
            )
        baked[name] = merged
    return baked

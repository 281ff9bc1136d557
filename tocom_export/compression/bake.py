"""Compensated weights: a checkpoint's, plus the bank's gap from source to target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BankError
from ..io.tensors import is_finite
from ..model.spec import VitSpec
from ..model.weight_names import qkv_parts
from ..variant import Variant
from .bank import ToComBank

Array = npt.NDArray[Any]


def bake(
    tensors: Mapping[str, Array], spec: VitSpec, bank: ToComBank, variant: Variant
) -> dict[str, Array]:
    """The tensors that differ in a variant: of every layer those that make queries and values.

    The fused qkv weight (3C, C), whose rows 0..C-1 are the query's and gain Δq, rows 2C..3C-1 the
    value's and gain Δv, or ``q_proj`` and ``v_proj`` where they lie by themselves; the key's rows
    are the checkpoint's. Each layer gains what its own target asks for. Summed in float64, then
    rounded once to float32. The values are absolute: nothing about a former degree is left in them.

    Raises:
        BankError: a sum is beyond float32's range.
    """
    baked: dict[str, Array] = {}
    for layer, target in enumerate(variant.targets):
        gaps = bank.gap(layer, variant.source, target, variant.scale)
        names = qkv_parts(spec, layer)
        for which, gap in zip((0, 2), gaps, strict=True):
            name = f"{names[which % len(names)]}.weight"
            first = which * spec.width if len(names) == 1 else 0
            rows = slice(first, first + spec.width)
            merged = baked.setdefault(name, tensors[name].astype(np.float32))
            with np.errstate(over="ignore"):
                merged[rows] = (tensors[name][rows] + gap).astype(np.float32)
            if not is_finite(merged[rows]):
                raise BankError(
                    f"`scale` {variant.scale:g} takes {name} beyond float32's range; choose a "
                    "smaller one."
                )
    return baked

"""int8 linear layers: which ones, how their weights are rounded, and back again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..model.spec import VitSpec
from ..model.weight_names import mlp_inputs, qkv_parts
from .precision import Precision

Array = npt.NDArray[Any]
LARGEST = 127
"""-128 is left out: TensorRT wants zero in the middle."""


def quantized_layers(spec: VitSpec) -> list[str]:
    """Linear layers that become int8: attention and MLP of each block, but the first qkv.

    That one decides the first merges, before anything else could make up for them. Patch
    embedding, heads and adapters stay as they are, too: they are a small part of the work.
    """
    layers: list[str] = []
    for layer in range(spec.depth):
        block = f"blocks.{layer}"
        layers += qkv_parts(spec, layer) if layer else ()
        layers += (f"{block}.attn.proj", *mlp_inputs(spec, layer), f"{block}.mlp.fc2")
    return layers


def scale_name(weight: str) -> str:
    """The tensor that holds an int8 weight's scales."""
    return f"{weight}_scale"


def quantize(weight: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A weight (out, in) as int8, and one float32 scale (out,) for each output channel.

    ``weight ≈ int8 · scale``, symmetric about zero; the largest of a channel becomes ±127.
    """
    wide = np.asarray(weight, np.float32)
    largest = np.abs(wide).max(axis=1)
    scale = np.where(largest > 0, largest / LARGEST, 1).astype(np.float32)
    return np.rint(wide / scale[:, None]).astype(np.int8), scale


def dequantize(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Stored tensors as PyTorch has them: int8 ones times their scales, no scales among them."""
    scales = {scale_name(name) for name in tensors if scale_name(name) in tensors}
    return {
        name: tensor * tensors[scale_name(name)][:, None] if scale_name(name) in tensors else tensor
        for name, tensor in tensors.items()
        if name not in scales
    }


def stored_form(
    tensors: Mapping[str, Array], precision: Precision, quantized: Iterable[str]
) -> dict[str, Array]:
    """Tensors as a weights file of that precision holds them.

    Args:
        tensors: PyTorch name → array of any floating type.
        quantized: layers whose weights are int8 where the precision says so.

    Raises:
        CheckpointError: a value is beyond the type's range.
    """
    weights = {f"{layer}.weight" for layer in quantized} if precision == "int8" else set()
    dtype = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}.get(precision, np.float32)
    stored: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if name in weights:
            stored[name], stored[scale_name(name)] = quantize(tensor)
            continue
        with np.errstate(over="ignore"):
            stored[name] = np.ascontiguousarray(tensor, dtype=dtype)
        if precision == "fp16" and not np.isfinite(stored[name]).all():
            raise CheckpointError(
                f"`precision` fp16: {name} has values beyond ±65504; choose `precision` bf16."
            )
    return stored

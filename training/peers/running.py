"""From a bundle, or a file made of one, to a peer's run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from tocom_export.study.accuracy import Run

Images = npt.NDArray[np.float32]
Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16", "int8"]
Kind = Literal["eager", "compiled", "scatter", "onnx", "openvino"]
"""The first three are a bundle's model in PyTorch, the others files, by what runs them."""


def open_run(
    place: Path, kind: Kind, precision: Precision, variant: str, device: Device, threads: int | None
) -> Run:
    """One of them: normalised images (B, C, H, W) → logits (B, classes), both float32.

    Args:
        place: a bundle, or a file that others wrote.
        precision: of a file, what it holds: int8 is in there.
        variant: at whose degrees ``scatter`` merges.
        threads: None leaves it to the library.
    """
    if kind == "onnx":
        from .onnx_peers import open_onnx

        return open_onnx(place, device, threads)
    if kind == "openvino":
        from .openvino_peers import open_openvino

        return open_openvino(place, precision, threads)
    from .torch_peers import open_torch

    return open_torch(place, kind, precision, variant, device, threads)

"""PyTorch models as something whose accuracy can be measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tocom_export.study.accuracy import RunOf, score

from .model import CompressedVit, SidePaths


def runner(
    model: CompressedVit, degree: int | Sequence[int] = 0, side: SidePaths | None = None
) -> RunOf:
    """The model at one degree, from images (B, C, H, W) to logits (B, classes), as arrays.

    Args:
        side: the bank's low-rank paths; None runs the weights as they are.
    """
    device = next(model.parameters()).device

    @torch.inference_mode()
    def run(images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        model.eval()
        logits: npt.NDArray[Any] = (
            model(torch.from_numpy(images).to(device), degree, side).float().cpu().numpy()
        )
        return logits

    return run


def accuracy(
    model: CompressedVit,
    batches: Iterable[tuple[Tensor, Tensor]],
    degree: int | Sequence[int] = 0,
) -> float:
    """Top-1 accuracy in percent over batches of images (B, C, H, W) and labels (B,)."""
    return score([runner(model, degree)], batches)[0].accuracy

"""Accuracy of the compressed model on labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tocom_export.training.model import CompressedVit, SidePaths


@torch.inference_mode()
def accuracy(
    model: CompressedVit,
    batches: Iterable[tuple[Tensor, Tensor]],
    degree: int | Sequence[int] = 0,
    side: SidePaths | None = None,
) -> float:
    """Top-1 accuracy in percent over batches of images (B, C, H, W) and labels (B,)."""
    model.eval()
    right = total = 0
    for images, labels in batches:
        right += int((model(images, degree, side).argmax(dim=-1) == labels).sum())
        total += len(labels)
    return 100 * right / total

"""Supervised training of a ViT at its source degree, from scratch or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tocom_export.atomic import replaced
from tocom_export.images import Preprocess
from tocom_export.info import ModelInfo
from tocom_export.training.data import TrainData
from tocom_export.training.loop import Recipe, Report, fit
from tocom_export.training.model import CompressedVit


def finetune(
    model: CompressedVit,
    data: TrainData,
    recipe: Recipe,
    out: Path,
    *,
    source: int = 0,
    preprocess: Preprocess,
    label_smoothing: float = 0.1,
    report: Report | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train ``model`` with token reduction at degree ``source``; write a checkpoint.

    The checkpoint's metadata say what it is, so that ``build`` needs no further options.
    Its training state lies beside it until the checkpoint is written.

    Args:
        out: the ``.safetensors`` file to write.
        source: the degree that the model runs at while it is trained.
    """
    state_file = out.with_suffix(".state")

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images, source), labels, label_smoothing=label_smoothing)

    fit(model, loss_of, data, recipe, state_file, report=report, after_epoch=after_epoch)
    info = ModelInfo(model.spec, source, model.method, data.classes, preprocess)
    tensors = {name: t.contiguous() for name, t in model.vit.state_dict().items()}
    with replaced(out) as beside:
        save_file(tensors, beside, info.to_metadata())
    state_file.unlink()

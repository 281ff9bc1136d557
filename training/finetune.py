"""Supervised training of a ViT at its source degree, from scratch or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.io.atomic import replace_file
from tocom_export.io.json_codec import encode
from tocom_export.model.preprocess import Preprocess

from .adaptformer import merge_adapter_scale
from .data.train import TrainData
from .loop.distributed import SINGLE_PROCESS, Process
from .loop.loop import ReportStep, train
from .loop.optimizer import Hyperparameters
from .loop.state import hash_weights, locate_state
from .model import CompressedVit


def finetune(
    model: CompressedVit,
    data: TrainData,
    hyperparameters: Hyperparameters,
    out: Path,
    *,
    source: int = 0,
    preprocess: Preprocess,
    label_smoothing: float = 0.1,
    process: Process = SINGLE_PROCESS,
    accumulate: int = 1,
    report: ReportStep | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train ``model`` with token reduction at degree ``source``; write ``out`` (.safetensors).

    Its metadata say what it is, so that ``build`` needs no further options. Its training state
    lies beside it until it is written. Weights that don't require a gradient stay as they are.
    """
    state_file = locate_state(out)
    model.to(process.device)

    def loss_of(images: Tensor, labels: Tensor, _: int) -> Tensor:
        return F.cross_entropy(model(images, source), labels, label_smoothing=label_smoothing)

    trained = [name for name, p in model.vit.named_parameters() if p.requires_grad]
    identity = {
        "spec": encode(model.spec, defaults=False),
        "method": str(model.method),
        "drop-path": model.drop_path,
        "weights": hash_weights(model.vit),
        "trained": trained,
        "adapter-scale": getattr(model.vit.blocks[0].mlp, "scale", None),
        "source": source,
        "label-smoothing": label_smoothing,
    }
    train(
        model, loss_of, data, hyperparameters, state_file,
        identity=identity, process=process, accumulate=accumulate,
        report=report, after_epoch=after_epoch,
    )  # fmt: skip
    if process.first:
        info = ModelInfo(model.spec, source, model.method, data.classes, preprocess)
        tensors = {name: t.cpu().contiguous() for name, t in merge_adapter_scale(model.vit).items()}
        with replace_file(out) as beside:
            save_file(tensors, beside, to_metadata(info))
        state_file.unlink()

"""Self-distillation of a bank on the pre-training data (paper, section 4.2)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tocom_export.bank import ToComBank
from tocom_export.schedule import MAX_DEGREE
from tocom_export.training.data import TrainData
from tocom_export.training.loop import Recipe, Report, digest, fit, state_of
from tocom_export.training.lowrank import TrainableBank
from tocom_export.training.model import CompressedVit


def distill_loss(
    model: CompressedVit, bank: TrainableBank, images: Tensor, source: int, target: int
) -> Tensor:
    """KL(teacher ‖ student) in nats, averaged over the batch.

    The student runs at the target degree with the gap added; the teacher is the same frozen
    model at the source degree.

    Args:
        images: (B, C, H, W).
    """
    with torch.no_grad():
        teacher = F.log_softmax(model(images, source), dim=-1)
    student = F.log_softmax(model(images, target, bank.side(source, target)), dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def draw_degrees() -> tuple[int, int]:
    """A source and another target, uniformly from 0..16, from torch's global generator."""
    source = int(torch.randint(MAX_DEGREE + 1, ()))
    shift = int(torch.randint(1, MAX_DEGREE + 1, ()))
    return source, (source + shift) % (MAX_DEGREE + 1)


def distill(
    model: CompressedVit,
    bank: TrainableBank,
    data: TrainData,
    recipe: Recipe,
    out: Path,
    *,
    report: Report | None = None,
) -> ToComBank:
    """Train the bank of a frozen model; write it to ``out`` (.safetensors).

    Its training state lies beside it until then, and is continued by the next call.
    """
    state_file = state_of(out)
    model.eval().requires_grad_(False)

    def loss_of(images: Tensor, _: Tensor) -> Tensor:
        return distill_loss(model, bank, images, *draw_degrees())

    identity = {
        "spec": model.spec.to_json(),
        "method": [model.method.name, model.method.proportional],
        "bank": [bank.scale, bank.dropout],
        "weights": digest(model.vit),
    }
    fit(bank, loss_of, data, recipe, state_file, identity=identity, report=report)
    trained = bank.to_bank()
    trained.save(out)
    state_file.unlink()
    return trained

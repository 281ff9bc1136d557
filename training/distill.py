"""Self-distillation of a bank on the pre-training data (paper, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tocom_export.compression.bank import ToComBank
from tocom_export.compression.schedule import MAX_DEGREE, Schedule
from tocom_export.errors import InputError
from tocom_export.io.json_codec import encode

from .data.train import TrainData
from .loop.distributed import SINGLE_PROCESS, Process
from .loop.loop import ReportStep, train
from .loop.optimizer import Hyperparameters
from .loop.state import hash_weights, locate_state
from .lora import TrainableBank
from .model import CompressedVit, Degrees

Draw = Callable[[int, int], tuple[int, Degrees]]
"""Of a seed and a step's number alone: the teacher's degree and the student's, or its schedule.

Every process of a run so draws the same, and does the same amount of work."""
Loss = Literal["kl", "features", "classes"]
"""``kl``: soft targets of the teacher (section 4.2). ``features``: L1 distance from the
teacher's embedding, for backbones without a classifier (section 5.6). ``classes``: labels
instead of a teacher, as the ablation has it (section 5.4)."""


def distill_loss(
    model: CompressedVit,
    bank: TrainableBank,
    images: Tensor,
    source: int,
    target: Degrees,
    loss: Loss = "kl",
    labels: Tensor | None = None,
) -> Tensor:
    """How far the compensated student is from what it should say, a mean over the batch.

    The student runs at the target degree with the gap added; the teacher is the same frozen
    model at the source degree, without drop path. ``kl`` is in nats.

    Args:
        target: of a schedule, each layer gains the gap to the degree that it is at.
        labels: (B,), or (B, classes) where images are mixed; read by ``classes`` alone.
    """
    side = bank.side(source, Schedule.of(model.spec, target, model.method.merge).targets)
    if loss == "classes":
        assert labels is not None
        return F.cross_entropy(model(images, target, side), labels)
    output = model.embedding if loss == "features" else model
    student = output(images, target, side).float()
    was_training = model.training
    model.eval()
    with torch.no_grad():
        teacher = output(images, source).float()
    model.train(was_training)
    return measure_distance(student, teacher, loss)


def measure_distance(student: Tensor, teacher: Tensor, loss: Loss) -> Tensor:
    """How far a student is from its teacher, a mean over the batch.

    Args:
        student, teacher: logits (B, classes), or for ``features`` what a head reads (B, C).
        loss: ``features``, the mean absolute difference; else the divergence in nats.
    """
    if loss == "features":
        return F.l1_loss(student, teacher)
    student, teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def draw_degrees(seed: int, step: int) -> tuple[int, int]:
    """A source and another target, uniformly from 0..16 (:data:`Draw`)."""
    source, shift = np.random.default_rng((seed, step)).integers((0, 1), MAX_DEGREE + 1)
    return int(source), int(source + shift) % (MAX_DEGREE + 1)


def draw_from(source: int, schedules: Sequence[Schedule]) -> Draw:
    """The source that a model was trained at, and uniformly one of the schedules that it is for.

    Raises:
        InputError: there is none that would have to be compensated for.
    """
    choices = [s.degrees for s in schedules if any(target != source for target in s.targets)]
    if not choices:
        raise InputError(
            f"`schedules`: all are at degree {source}, which the model was trained at."
        )

    def draw(seed: int, step: int) -> tuple[int, Degrees]:
        return source, choices[np.random.default_rng((seed, step)).integers(len(choices))]

    return draw


def distill(
    model: CompressedVit,
    bank: TrainableBank,
    data: TrainData,
    hyperparameters: Hyperparameters,
    out: Path,
    *,
    loss: Loss = "kl",
    draw: Draw = draw_degrees,
    about: Mapping[str, object] | None = None,
    process: Process = SINGLE_PROCESS,
    accumulate: int = 1,
    report: ReportStep | None = None,
) -> ToComBank:
    """Train the bank of a frozen model; write it to ``out`` (.safetensors).

    Its training state lies beside it until then, and is continued by the next call.

    Args:
        draw: the degrees of each step.
        about: what else decides the outcome, as JSON: what the bank begins with, and ``draw``.

    Raises:
        InputError: the loss needs a head, or classes, that aren't there; or see ``train``.
    """
    check_loss(loss, model, data)
    model.requires_grad_(False).to(process.device).train()
    bank.to(process.device)

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        source, target = draw(hyperparameters.seed, step)
        return distill_loss(model, bank, images, source, target, loss=loss, labels=labels)

    identity = {
        "spec": encode(model.spec, defaults=False),
        "method": str(model.method),
        "drop-path": model.drop_path,
        "loss": loss,
        "arithmetic": bank.arithmetic,
        "scale": bank.scale,
        "dropout": bank.dropout,
        "weights": hash_weights(model.vit),
        **(about or {}),
    }
    state_file = locate_state(out)
    train(
        bank, loss_of, data, hyperparameters, state_file,
        identity=identity, process=process, accumulate=accumulate, report=report,
    )  # fmt: skip
    trained = bank.to_bank()
    if process.first:
        trained.save(out)
        state_file.unlink()
    return trained


def check_loss(loss: Loss, model: CompressedVit, data: TrainData) -> None:
    """Raise InputError where model and data don't have what a loss needs."""
    classes = model.spec.classes
    if loss != "features" and not classes:
        raise InputError(
            f"{model.spec.model} has no head, which `loss` {loss} compares; use `loss` features."
        )
    if loss == "classes" and len(data.classes) != classes:
        raise InputError(
            f"`loss` classes: the data has {len(data.classes)} classes, the model {classes}; give "
            "the images it was trained on, or use `loss` kl, which needs no labels."
        )

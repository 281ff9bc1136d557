"""How weights are updated: AdamW, and a learning rate that follows the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from tocom_export.errors import InputError

from .distributed import Process


@dataclass(frozen=True)
class Hyperparameters:
    """How long and how fast to train: cosine decay to zero after a linear warm-up, if any."""

    epochs: int
    batch: int
    """Images a step, over all processes."""
    lr: float
    """The learning rate at its peak."""
    weight_decay: float = 0.05
    warmup_epochs: int = 0
    """Of the ``epochs``, those in which the learning rate rises to ``lr``."""
    clip: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"`warmup` {self.warmup_epochs} must be fewer than the {self.epochs} `epochs`."
            )


class Optimizer:
    """AdamW with its learning rate, and with gradients clipped and, in fp16, scaled.

    ``parts`` is what its state consists of, each with ``state_dict`` and ``load_state_dict``.
    """

    def __init__(
        self,
        module: nn.Module,
        hyperparameters: Hyperparameters,
        steps_per_epoch: int,
        process: Process,
    ) -> None:
        self._module, self._clip = module, hyperparameters.clip
        lr, warmup = hyperparameters.lr, hyperparameters.warmup_epochs
        self._adamw: Any = create_optimizer_v2(
            module, opt="adamw", lr=lr, weight_decay=hyperparameters.weight_decay
        )
        self._schedule: Any = create_scheduler_v2(
            self._adamw,
            sched="cosine",
            num_epochs=hyperparameters.epochs - warmup,
            warmup_epochs=warmup,
            warmup_lr=lr / 100,
            warmup_prefix=True,  # the decay starts from the peak, not where it would be by then
            min_lr=0.0,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )[0]
        scaled = process.amp is torch.float16  # bf16 has float32's range
        self._scaler = torch.amp.GradScaler(process.device.type, enabled=scaled)
        self.parts: dict[str, Any] = {"optimizer": self._adamw, "scaler": self._scaler}

    @property
    def lr(self) -> float:
        """The learning rate of the step that was begun last."""
        return float(self._adamw.param_groups[0]["lr"])

    def begin(self, step: int) -> None:
        """Set the learning rate of a step, counted from 0, and forget the gradients."""
        self._schedule.step_update(step)
        self._adamw.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss."""
        self._scaler.scale(loss).backward()

    def update(self) -> None:
        """Clip the gradients and update the weights."""
        if self._clip is not None:
            self._scaler.unscale_(self._adamw)
            nn.utils.clip_grad_norm_(self._module.parameters(), self._clip)
        self._scaler.step(self._adamw)
        self._scaler.update()

"""The training loop that distilling a bank and fine-tuning a model share."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tocom_export.errors import InputError, Stopped, TocomError

from ..data.train import Share, TrainData, seed_all
from .distributed import ALONE, Placement
from .log import RunLog
from .out_of_memory import explained
from .state import StateFile

LossOf = Callable[[Tensor, Tensor, int], Tensor]
"""Images (B, C, H, W), labels (B,) or (B, classes), and the step's number → scalar loss."""
Report = Callable[[int, int, float, float], None]
"""Called after each step with step, total steps, loss and learning rate."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. Cosine decay to zero after a linear warm-up."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float = 0.05
    warmup_epochs: int = 0
    """Of the ``epochs``, those in which the learning rate rises to ``lr``."""
    clip: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"--warmup {self.warmup_epochs}: fewer than the {self.epochs} --epochs are needed."
            )


def fit(
    module: nn.Module,
    loss_of: LossOf,
    data: TrainData,
    recipe: Recipe,
    state_file: Path,
    *,
    identity: Mapping[str, object],
    placement: Placement = ALONE,
    accumulate: int = 1,
    report: Report | None = None,
    after_epoch: Callable[[int], None] | None = None,
    save_seconds: float = 60.0,
) -> None:
    """Train ``module`` on ``data``; continue from ``state_file`` where there is one.

    Saves its state there every ``save_seconds`` and after each epoch (written beside and
    renamed), and notes each step in a .csv file of the same stem. A resumed run takes the very
    steps that an unbroken one would have taken: every random draw depends on the seed, the
    step and the part of the batch alone.

    Args:
        module: what is trained, on ``placement.device``; parameters that don't require a
            gradient stay as they are.
        identity: what else decides the outcome, as JSON; a state of another is refused.
        accumulate: parts that a process cuts its share of a batch into.
        after_epoch: called with the number of epochs done, in the first process.

    Raises:
        CheckpointError: ``state_file`` is of another recipe or model.
        InputError: out of memory; says what to lower.
        Stopped: on SIGTERM, once the state is saved.
        TocomError: the loss is no longer finite; names the step and the last good state.
    """
    share = Share(placement.rank, placement.world, accumulate)
    per_epoch = data.steps_per_epoch
    optimizer, scheduler = _schedule(module, recipe, per_epoch)
    scaler = torch.amp.GradScaler(
        placement.device.type, enabled=placement.amp is torch.float16
    )  # bf16 has float32's range and needs no scaling
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    state = StateFile(
        state_file,
        {"module": module, "optimizer": optimizer, "scaler": scaler},
        {**asdict(recipe), **data.identity, **identity, "amp": str(placement.amp), "model": shapes},
    )
    step = state.resume()
    placement.agree(step, f"the number of steps in {state_file}; every machine must see that file")
    total = recipe.epochs * per_epoch
    loss_module = placement.distributed(_Loss(module, loss_of))

    def save() -> None:
        if not _finite(module):  # in all processes, which hold the same weights
            raise _not_finite("weights that are not finite", step, total, state_file)
        if placement.first:
            state.save(step)

    def take(batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step; the loss averaged over its whole batch."""
        optimizer.zero_grad()
        value = 0.0
        for part in range(accumulate):
            images, labels = (t.to(placement.device, non_blocking=True) for t in next(batches))
            seed_all(recipe.seed, step, placement.rank + part * placement.world)
            if data.mix is not None:
                images, labels = data.mix(images, labels)
            with _unsynced(loss_module, part + 1 < accumulate):
                with placement.autocast():
                    loss = loss_module(images, labels, step) / accumulate
                scaler.scale(loss).backward()
            value += loss.item()
        (value,) = placement.mean(value)
        if not math.isfinite(value):
            raise _not_finite(f"loss {value}", step + 1, total, state_file)
        if recipe.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
        scaler.step(optimizer)
        scaler.update()
        return value

    with (
        RunLog(state_file.with_suffix(".csv"), step) if placement.first else nullcontext() as log,
        _terminated() as terminated,
        explained(
            f"--batch {recipe.batch} --accumulate {accumulate}",
            f"lower --batch, or give --accumulate {2 * accumulate}, which computes the same in "
            "smaller parts; on CUDA --amp bf16 halves activations",
        ),
    ):
        saved, cost = time.monotonic(), 0.0
        while step < total:
            epoch, within = divmod(step, per_epoch)
            batches = data.epoch(epoch, within, share)
            module.train()
            while step < (epoch + 1) * per_epoch:
                scheduler.step_update(step)
                value = take(batches)
                step += 1
                lr = optimizer.param_groups[0]["lr"]
                if log is not None:
                    log.step(step, value, lr)
                if report:
                    report(step, total, value, lr)
                (stop,) = placement.mean(float(terminated()))
                due = time.monotonic() - saved > max(save_seconds, 50 * cost)
                # A large model takes a while to save; training gets the better part of the time,
                # and the end of an epoch is a good moment only where saving is cheap.
                ended = step == (epoch + 1) * per_epoch
                if stop or due or step == total or (ended and cost < 0.2):
                    if log is not None:
                        log.flush()
                    began = time.monotonic()
                    save()
                    saved = time.monotonic()
                    cost = saved - began
                if stop:
                    raise Stopped(f"Stopped after step {step} of {total}; saved in {state_file}.")
            if after_epoch and placement.first:
                after_epoch(epoch + 1)
            placement.wait()


def _schedule(module: nn.Module, recipe: Recipe, per_epoch: int) -> tuple[Any, Any]:
    """AdamW, and its learning rate over the steps."""
    optimizer = create_optimizer_v2(
        module, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs - recipe.warmup_epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.lr / 100,
        warmup_prefix=True,  # the decay starts from the peak, not from where it would be by then
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
    )
    return optimizer, scheduler


def _finite(module: nn.Module) -> bool:
    """Whether all weights are numbers; waits for the device once."""
    return bool(torch.stack([p.isfinite().all() for p in module.parameters()]).all())


class _Loss(nn.Module):
    """The loss as a module, whose forward pass DistributedDataParallel can wrap."""

    def __init__(self, module: nn.Module, loss_of: LossOf) -> None:
        super().__init__()
        self.module, self._loss_of = module, loss_of

    def forward(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        return self._loss_of(images, labels, step)


def _unsynced(module: nn.Module, unsynced: bool) -> Any:
    """Gradients stay in this process while parts of a batch are still to come."""
    if unsynced and isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def _not_finite(what: str, step: int, total: int, state_file: Path) -> TocomError:
    last = f"is in {state_file}" if state_file.exists() else "was the start"
    return TocomError(
        f"{what} at step {step} of {total}; the last good state {last}. "
        "Lower --lr, or limit the gradient's norm with --clip."
    )


@contextmanager
def _terminated() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came since; until then it only leaves a note, so a step is finished."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        came.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)

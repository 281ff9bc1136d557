"""The training loop that distilling a bank and fine-tuning a model share."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from tocom_export.atomic import replaced
from tocom_export.errors import CheckpointError, OutputError, TocomError, brief
from tocom_export.training.data import TrainData, seed_all

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
    clip: float | None = None
    """Largest norm of the gradient; None leaves it as it is."""
    seed: int = 0


def fit(
    module: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    data: TrainData,
    recipe: Recipe,
    state_file: Path,
    *,
    identity: Mapping[str, object],
    report: Report | None = None,
    after_epoch: Callable[[int], None] | None = None,
    save_seconds: float = 60.0,
) -> None:
    """Train ``module`` on ``data``; continue from ``state_file`` where there is one.

    Saves its state there every ``save_seconds`` and after each epoch (written beside and
    renamed), and appends one line per step to a .csv file of the same
    stem. A resumed run takes the
    very steps that an unbroken one would have taken.

    Args:
        module: what is trained; parameters that don't require a gradient stay as they are.
        loss_of: images (B, C, H, W) and labels (B,) → scalar loss.
        identity: what else decides the outcome, as JSON; a state of another is refused.
        after_epoch: called with the number of epochs done.

    Raises:
        CheckpointError: ``state_file`` is of another recipe or model.
        TocomError: the loss is no longer finite; names the step and the last good state.
    """
    optimizer = create_optimizer_v2(
        module, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.lr / 100,
        warmup_prefix=False,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=data.steps_per_epoch,
    )
    fingerprint = _fingerprint(module, recipe, {**data.identity, **identity})
    total = recipe.epochs * data.steps_per_epoch
    step = _resume(state_file, fingerprint, module, optimizer)
    log_file = state_file.with_suffix(".csv")
    _trim_log(log_file, step)
    saved = time.monotonic()

    def save() -> None:
        state = {
            "fingerprint": fingerprint,
            "step": step,
            "module": module.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        stream = io.BytesIO()  # torch reports a full disk as an error of its own
        torch.save(state, stream)
        with replaced(state_file) as beside:
            beside.write_bytes(stream.getbuffer())

    with log_file.open("a", newline="") as stream:
        log = csv.writer(stream)
        while step < total:
            epoch, within = divmod(step, data.steps_per_epoch)
            module.train()
            for images, labels in data.epoch(epoch, within):
                scheduler.step_update(step)
                seed_all(recipe.seed, step)
                loss = loss_of(images, labels)
                value = loss.item()
                if not math.isfinite(value):
                    last = f"is in {state_file}" if state_file.exists() else "was the start"
                    raise TocomError(
                        f"loss {value} at step {step} of {total}; the last good state {last}. "
                        "Lower the learning rate, or clip the gradient."
                    )
                optimizer.zero_grad()
                loss.backward()
                if recipe.clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
                optimizer.step()
                step += 1
                lr = optimizer.param_groups[0]["lr"]
                log.writerow([step, f"{value:.6f}", f"{lr:.3e}"])
                if report:
                    report(step, total, value, lr)
                if time.monotonic() - saved > save_seconds:
                    stream.flush()
                    save()
                    saved = time.monotonic()
            stream.flush()
            save()
            if after_epoch:
                after_epoch(epoch + 1)


def state_of(out: Path) -> Path:
    """Where the training state of a result lies until the result is written."""
    return out.with_name(f"{out.name}.state")


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights: the part of an identity that shapes don't tell."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _fingerprint(module: nn.Module, recipe: Recipe, identity: Mapping[str, object]) -> str:
    """What must be the same for a state to be continued."""
    shapes = {name: list(t.shape) for name, t in module.state_dict().items()}
    text = json.dumps([asdict(recipe), shapes, identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _resume(
    state_file: Path, fingerprint: str, module: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load the state, if there is one; the number of steps done."""
    if not state_file.exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(state_file, map_location="cpu", weights_only=True)
        if state["fingerprint"] != fingerprint:
            raise CheckpointError(
                f"{state_file} is of a run with another recipe, model or data; "
                "remove it, or train into another folder."
            )
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except CheckpointError:
        raise
    except Exception as error:  # torch raises a different one for each way a file is broken
        raise CheckpointError(
            f"{state_file} is not a training state ({brief(error)}); remove it to start anew."
        ) from error


def _trim_log(log_file: Path, step: int) -> None:
    """Keep the lines of the steps that the state has seen; make the file where there is none.

    Raises:
        OutputError: it can't be written.
    """
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        lines = log_file.read_text().splitlines(keepends=True) if log_file.exists() else []
        log_file.write_text("".join(lines[:step]))
    except OSError as error:
        raise OutputError(f"{log_file}: can't be written: {error.strerror}.") from error

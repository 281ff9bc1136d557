"""The training loop that distilling a bank and fine-tuning a model share."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tocom_export.errors import Stopped, TocomError

from ..data.seeding import seed_all
from ..data.train import Share, TrainData
from .distributed import SINGLE_PROCESS, Process
from .log import RunLog
from .optimizer import Hyperparameters, Optimizer
from .out_of_memory import explain_out_of_memory
from .state import StateFile

LossOf = Callable[[Tensor, Tensor, int], Tensor]
"""Images (B, C, H, W), labels (B,) or (B, classes), and the step's number → scalar loss."""
ReportStep = Callable[[int, int, float, float], None]
"""Called after each step with step, total steps, loss and learning rate."""


def train(
    module: nn.Module,
    loss_of: LossOf,
    data: TrainData,
    hyperparameters: Hyperparameters,
    state_file: Path,
    *,
    identity: Mapping[str, object],
    process: Process = SINGLE_PROCESS,
    accumulate: int = 1,
    report: ReportStep | None = None,
    after_epoch: Callable[[int], None] | None = None,
    save_seconds: float = 60.0,
) -> None:
    """Train ``module`` on ``data``; continue from ``state_file`` where there is one.

    Saves its state there every ``save_seconds`` and after each epoch (written beside and
    renamed), and notes each step in a .csv file of the same stem. A resumed run takes the very
    steps that an unbroken one would have taken: every random draw depends on the seed, the
    step and the part of the batch alone.

    Args:
        module: what is trained, on ``process.device``; parameters that don't require a
            gradient stay as they are.
        identity: what else decides the outcome, as JSON; a state of another is refused.
        accumulate: parts that a process cuts its share of a batch into.
        after_epoch: called with the number of epochs done, in the first process.
        save_seconds: the least time between two saves within an epoch.

    Raises:
        InputError: ``state_file`` is of another recipe or model, a batch can't be cut into equal
            parts, too many images can't be read, or memory isn't enough.
        Stopped: on Ctrl-C or SIGTERM, once the state is saved; a second Ctrl-C doesn't wait.
        TocomError: loss or weights are NaN or Inf; names the step and the last good state.
    """
    run = _Run(module, loss_of, data, hyperparameters, state_file, identity, process, accumulate)
    with (
        RunLog(state_file.with_suffix(".csv"), run.step) if process.first else nullcontext() as log,
        _catch_signals() as stopped,
        explain_out_of_memory(
            f"`batch` {hyperparameters.batch} and `accumulate` {accumulate}",
            f"lower `batch`, or raise `accumulate` to {2 * accumulate}, which computes the same in "
            "smaller parts; on CUDA `amp` bf16 halves activations",
        ),
    ):
        for epoch in range(run.step // data.steps_per_epoch, hyperparameters.epochs):
            for loss in run.take_steps(epoch):
                if log:
                    log.step(run.step, loss, run.optimizer.lr)
                if report:
                    report(run.step, run.total, loss, run.optimizer.lr)
                stop = process.average(float(stopped())) > 0  # whichever process it was sent to
                if stop or run.is_save_due(save_seconds):
                    if log:
                        log.flush()
                    run.save()
                if stop:
                    raise Stopped(
                        f"Stopped after step {run.step} of {run.total}; saved in {state_file}."
                    )
            if after_epoch and process.first:
                after_epoch(epoch + 1)
            process.wait()


class _Run:
    """A run and how far it is: ``step`` of ``total`` steps are done, at first those resumed."""

    def __init__(
        self,
        module: nn.Module,
        loss_of: LossOf,
        data: TrainData,
        hyperparameters: Hyperparameters,
        state_file: Path,
        identity: Mapping[str, object],
        process: Process,
        accumulate: int,
    ) -> None:
        self._module, self._data, self._seed = module, data, hyperparameters.seed
        self._process, self._accumulate = process, accumulate
        self.total = hyperparameters.epochs * data.steps_per_epoch
        self.optimizer = Optimizer(module, hyperparameters, data.steps_per_epoch, process)
        # Of a recipe, which says more, the data and the identity tell the rest.
        settings = {f.name: getattr(hyperparameters, f.name) for f in fields(Hyperparameters)}
        shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        self._state = StateFile(
            state_file,
            {"module": module, **self.optimizer.parts},
            {**settings, **data.identity, **identity, "amp": str(process.amp), "model": shapes},
        )
        self.step = self._state.resume()
        process.require_same(
            self.step, f"the number of steps in {state_file}; every machine must see that file"
        )
        # After the weights are loaded, since it hands the first process's to all others.
        self._loss = process.synchronize_gradients(_Loss(module, loss_of))
        self._saved, self._cost = time.monotonic(), 0.0

    def take_steps(self, epoch: int) -> Iterator[float]:
        """Take the steps left of an epoch; yield each one's loss, once it is known to be finite."""
        end = (epoch + 1) * self._data.steps_per_epoch
        share = Share(self._process.rank, self._process.world, self._accumulate)
        batches = self._data.epoch(epoch, self.step % self._data.steps_per_epoch, share)
        self._module.train()
        while self.step < end:
            self.optimizer.begin(self.step)
            loss = self._process.average(
                sum(self._add_gradients(part, *next(batches)) for part in range(self._accumulate))
            )
            if not math.isfinite(loss):
                raise self._explain_not_finite(f"loss {loss}", self.step + 1)
            self.optimizer.update()
            self.step += 1
            yield loss

    def _add_gradients(self, part: int, images: Tensor, labels: Tensor) -> float:
        """Forward and backward pass of one of this process's parts of a batch; its loss."""
        device, rank, world = self._process.device, self._process.rank, self._process.world
        images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
        seed_all(self._seed, self.step, rank + part * world)
        if self._data.mix is not None:
            images, labels = self._data.mix(images, labels)  # labels: (B, classes)
        exchange: AbstractContextManager[None] = nullcontext()
        if part + 1 < self._accumulate and isinstance(self._loss, DistributedDataParallel):
            exchange = self._loss.no_sync()  # processes exchange gradients with the last part
        with exchange:
            with self._process.autocast():
                loss = self._loss(images, labels, self.step) / self._accumulate
            self.optimizer.backward(loss)
        return float(loss.item())

    def is_save_due(self, save_seconds: float) -> bool:
        """Whether to save now: at the end, and now and then.

        A large model takes a while to save; training gets the better part of the time, and the
        end of an epoch is a good moment only where saving is cheap.
        """
        waited = time.monotonic() - self._saved
        if self.step == self.total or waited > max(save_seconds, 50 * self._cost):
            return True
        return self.step % self._data.steps_per_epoch == 0 and self._cost < 0.2

    def save(self) -> None:
        """Write the state, in the first process, unless a weight is NaN or Inf in all of them."""
        began = time.monotonic()
        finite = [p.isfinite().all() for p in self._module.parameters()]
        if not torch.stack(finite).all():  # waits for the device once
            raise self._explain_not_finite("weights are NaN or Inf", self.step)
        if self._process.first:
            self._state.save(self.step)
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def _explain_not_finite(self, what: str, step: int) -> TocomError:
        file = self._state.file
        last = f"is in {file}" if file.exists() else "was the start"
        return TocomError(
            f"{what} at step {step} of {self.total}; the last good state {last}. "
            "Lower `lr`, or limit the gradient's norm with `clip`."
        )


class _Loss(nn.Module):
    """The loss as a module, whose forward pass DistributedDataParallel can wrap."""

    def __init__(self, module: nn.Module, loss_of: LossOf) -> None:
        super().__init__()
        self.module, self._loss_of = module, loss_of

    def forward(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        return self._loss_of(images, labels, step)


@contextmanager
def _catch_signals() -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C or SIGTERM came, so that a step can be finished first."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set  # only the main thread may handle signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        if came.is_set() and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        came.set()

    caught = (signal.SIGINT, signal.SIGTERM)
    # A shell has Ctrl-C ignored by what it starts in the background; that stays so.
    before = {n: handler for n in caught if (handler := signal.getsignal(n)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

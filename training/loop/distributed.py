"""The processes of a training run: device, precision, and what they tell each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tocom_export.errors import InputError

Amp = Literal["none", "bf16", "fp16"]
_CPU = torch.device("cpu")
_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Process:
    """One process of a run; the only one, on the CPU in float32, unless said otherwise."""

    device: torch.device = _CPU
    amp: torch.dtype | None = None
    """What autocast computes in; None for float32 throughout."""
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[None]:
        """The context that a forward pass runs in."""
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def synchronize_gradients(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over all processes."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False)

    def average(self, value: float) -> float:
        """The value averaged over all processes; all get the same number."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor / self.world)

    def require_same(self, value: int, what: str) -> None:
        """Raise InputError in every process unless all of them have the same value."""
        if self.world > 1:
            values: list[Any] = [None] * self.world
            dist.all_gather_object(values, value)
            if len(set(values)) > 1:
                raise InputError(f"processes differ in {what}.")

    def wait(self) -> None:
        """Return when every process is here."""
        if self.world > 1:
            dist.barrier()


SINGLE_PROCESS = Process()


@contextmanager
def join_processes(device: str | None = None, amp: Amp = "none") -> Iterator[Process]:
    """Join the processes that ``torchrun`` started, if it did; leave them at the end.

    Raises:
        InputError: no such device (see :func:`choose_device`), or fp16 on the CPU.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    place = choose_device(device)
    if amp == "fp16" and place.type == "cpu":
        raise InputError("`amp` fp16 needs a CUDA device; the CPU takes bf16 or none.")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        backend = "nccl" if place.type == "cuda" else "gloo"
        # The first process may measure accuracy for long while the others wait.
        dist.init_process_group(backend, timeout=timedelta(hours=4))
    try:
        yield Process(place, _DTYPES[amp], rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


def choose_device(name: str | None = None) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``; default: CUDA where there is one.

    Under ``torchrun`` it is the CUDA device of this process's number.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"`device` {name}: expected cpu, cuda or cuda:N.")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        version = torch.__version__
        raise InputError(f"`device` {name}: torch {version} sees no CUDA device; use cpu.")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    index = int(os.environ.get("LOCAL_RANK", 0) if several else name[5:] or 0)
    if index >= (count := torch.cuda.device_count()):
        raise InputError(
            f"`device` cuda:{index}: this machine has {count} CUDA devices, counted from 0."
        )
    return torch.device("cuda", index)

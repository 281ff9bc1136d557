"""Where a training run computes: its device, its precision, its part among processes."""

from __future__ import annotations

import os
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
class Placement:
    """One process of a run; alone on the CPU unless said otherwise."""

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

    def distributed(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over all processes."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False)

    def mean(self, *values: float) -> list[float]:
        """Each value averaged over all processes; all get the same numbers."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(total / self.world) for total in tensor]

    def agree(self, value: int, what: str) -> None:
        """Raise InputError in every process unless all of them have the same value."""
        if self.world > 1:
            values: list[Any] = [None] * self.world
            dist.all_gather_object(values, value)
            if len(set(values)) > 1:
                raise InputError(f"processes differ in {what}.")

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


ALONE = Placement()
"""One process on the CPU, in float32."""


@contextmanager
def placed(device: str | None = None, amp: Amp = "none") -> Iterator[Placement]:
    """The placement of this process; one of several where ``torchrun`` started it.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``; default: CUDA where there is one.

    Raises:
        InputError: no such device, or fp16 on the CPU.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: cpu, cuda or cuda:N is expected.") from None
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                f"--device {name}: torch {torch.__version__} sees no CUDA device; use cpu."
            )
        index = int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else (place.index or 0)
        if index >= (count := torch.cuda.device_count()):
            raise InputError(f"--device cuda:{index}: there are {count} CUDA devices.")
        place = torch.device("cuda", index)
        torch.cuda.set_device(place)
    elif place.type != "cpu":
        raise InputError(f"--device {name}: cpu, cuda or cuda:N is expected.")
    if amp == "fp16" and place.type == "cpu":
        raise InputError("--amp fp16 needs a CUDA device; the CPU takes bf16 or none.")
    if world > 1:
        # The first process may measure accuracy for long while the others wait.
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo", timeout=timedelta(hours=4)
        )
    try:
        yield Placement(place, _DTYPES[amp], rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()

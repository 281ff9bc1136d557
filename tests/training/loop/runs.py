"""Small training runs: for tests to run themselves, and for processes that they start.

``python runs.py distil IMAGES OUT`` distils a bank and prints each step's number.
``python runs.py ddp IMAGES OUT``, started once for each process of a group, does each of
``CASES``, one after another.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tocom_export.compression.method import Method
from tocom_export.errors import Stopped
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training import distill as distilling
from tocom_export.training.building import vit_from_spec
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.train import TrainData
from tocom_export.training.finetune import finetune
from tocom_export.training.loop.distributed import SINGLE_PROCESS, Process, join_processes
from tocom_export.training.loop.loop import train
from tocom_export.training.loop.optimizer import Hyperparameters
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit

SPEC = VitSpec(
    model="small", image_size=(32, 32), patch_size=(8, 8), width=16, depth=2, heads=2,
    mlp_width=32, classes=2,
)  # fmt: skip
HYPERPARAMETERS = Hyperparameters(epochs=4, batch=8, lr=1e-3, warmup_epochs=1, clip=1.0)
STEPS = 20
"""5 an epoch, of 40 images."""

MIXED = {"augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}


def run_bank(
    images: Path, out: Path, process: Process = SINGLE_PROCESS, *, full: bool = True, **options: Any
) -> None:
    """Distil a bank.

    Args:
        full: with all that is drawn for a part of a batch: dropout, drop path and mixing.
    """
    torch.manual_seed(0)
    vit = vit_from_spec(SPEC, drop_path=0.2 if full else 0.0)
    bank = TrainableBank(SPEC, Method("tome"), dropout=0.1 if full else 0.0)
    data = TrainData(
        open_images(images), SPEC, Preprocess(), HYPERPARAMETERS.batch, **MIXED if full else {}
    )
    model = CompressedVit(vit, name="small")
    distilling.distill(model, bank, data, HYPERPARAMETERS, out, process=process, **options)


def run_model(images: Path, out: Path, process: Process = SINGLE_PROCESS, **options: Any) -> None:
    """Train all weights."""
    torch.manual_seed(0)
    model = CompressedVit(vit_from_spec(SPEC), name="small")
    data = TrainData(open_images(images), SPEC, Preprocess(), HYPERPARAMETERS.batch)
    finetune(
        model,
        data,
        HYPERPARAMETERS,
        out,
        source=2,
        preprocess=Preprocess(),
        process=process,
        **options,
    )


CASES: dict[str, Callable[..., None]] = {
    "plain": partial(run_bank, full=False),
    "full": run_bank,
    "model": run_model,
}


def largest_difference(file: Path, other: Path) -> float:
    """Of all weights."""
    first, second = load_file(file), load_file(other)
    assert first.keys() == second.keys()
    return max(float((tensor - second[name]).abs().max()) for name, tensor in first.items())


def _ddp(images: Path, folder: Path) -> None:
    def last_process_is_stopped(step: int, *_: float) -> None:
        if step == 7 and process.rank == process.world - 1:
            signal.raise_signal(signal.SIGTERM)

    with join_processes("cpu") as process:
        for name, case in CASES.items():
            case(images, folder / f"{name}.safetensors", process)
        try:
            run_bank(
                images, folder / "stopped.safetensors", process, report=last_process_is_stopped
            )
        except Stopped as error:
            (folder / f"stopped{process.rank}").write_text(str(error))
        process.wait()


def _distil(images: Path, out: Path) -> None:
    def report(step: int, *_: float) -> None:
        print(step, flush=True)
        time.sleep(0.05)  # so that who reads it can do something before the run is over

    distilling.train = partial(train, save_seconds=0.0)  # type: ignore[attr-defined]
    run_bank(images, out, report=report)


if __name__ == "__main__":
    assert os.environ["OMP_NUM_THREADS"] == "1"
    {"ddp": _ddp, "distil": _distil}[sys.argv[1]](*map(Path, sys.argv[2:]))

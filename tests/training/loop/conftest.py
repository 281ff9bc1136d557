"""A tiny training run, which tests stop, resume and compare."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tocom_export.model.preprocess import Preprocess
from tocom_export.training.building import vit_from_spec
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.train import TrainData
from tocom_export.training.loop.loop import train
from tocom_export.training.loop.optimizer import Hyperparameters

HYPERPARAMETERS = Hyperparameters(epochs=3, batch=4, lr=1e-2, warmup_epochs=1, clip=1.0)
STEPS = 9


class Stop(Exception):
    """Stands in for a killed process."""


class Run:
    """A tiny training run with drop path, so that random draws matter."""

    def __init__(self, folder: Path, images: Path, spec: Any) -> None:
        self.state = folder / "run.state"
        self._images, self._spec = images, spec
        torch.manual_seed(7)
        self.module = vit_from_spec(spec, drop_path=0.3)
        self.losses: list[tuple[int, float, float]] = []

    def train(
        self,
        hyperparameters: Hyperparameters = HYPERPARAMETERS,
        stop: int | None = None,
        **options: Any,
    ) -> None:
        """Train, or continue; as if the process were killed after step ``stop``."""

        def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
            return F.cross_entropy(self.module(images), labels)

        def report(step: int, total: int, loss: float, lr: float) -> None:
            assert total == STEPS
            self.losses.append((step, loss, lr))
            if step == stop:
                raise Stop

        options.setdefault("loss_of", loss_of)
        options.setdefault("identity", {})
        options.setdefault("data", self.data(hyperparameters))
        with pytest.raises(Stop) if stop else nullcontext():
            train(
                self.module, hyperparameters=hyperparameters, state_file=self.state,
                report=report, **options,
            )  # fmt: skip

    def data(self, hyperparameters: Hyperparameters = HYPERPARAMETERS, **options: Any) -> TrainData:
        options = {"augment": "rand-m9", "erasing": 0.5, **options}
        images = open_images(self._images)
        return TrainData(
            images,
            self._spec,
            Preprocess(),
            hyperparameters.batch,
            seed=hyperparameters.seed,
            **options,
        )


@pytest.fixture
def make_run(tmp_path: Path, image_folder: Callable[..., Path], make_spec) -> Callable[[str], Run]:
    spec = make_spec(image_size=[16, 16], width=16, heads=2, depth=2, mlp_width=32, classes=2)
    images = image_folder(tmp_path / "images")

    def make(name: str) -> Run:
        (tmp_path / name).mkdir(exist_ok=True)
        return Run(tmp_path / name, images, spec)

    return make


@pytest.fixture
def hyperparameters() -> Hyperparameters:
    """Those that a run has by default."""
    return HYPERPARAMETERS

"""The paper's settings (section 5.1 and its table), and options in place of what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .data.transforms import Augmentation
from .loop.optimizer import Hyperparameters


@dataclass(frozen=True)
class Settings(Augmentation, Hyperparameters):
    """Hyper-parameters, and what is done to the images and the model while training."""

    label_smoothing: float = 0.0
    drop_path: float = 0.1
    """Stochastic depth of the last layer."""

    def change(self, options: Mapping[str, Any]) -> Settings:
        """These settings with those options, named as the fields are, that are given.

        A learning rate that isn't given grows with the batch, and a warm-up that isn't given is
        shorter in a run that is.
        """
        given = {f.name: options[f.name] for f in fields(self) if options.get(f.name) is not None}
        lr = self.lr * given.get("batch", self.batch) / self.batch
        warmup = self.warmup_epochs * given.get("epochs", self.epochs) // self.epochs
        scaled = {"lr": lr, "warmup_epochs": min(self.warmup_epochs, warmup)}
        return replace(self, **{**scaled, **given})

    def augmentation(self) -> dict[str, Any]:
        """What training data take of it."""
        return {field.name: getattr(self, field.name) for field in fields(Augmentation)}


DISTILL = Settings(
    epochs=10, batch=1024, lr=2e-3, augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8,
    cutmix=1.0,
)  # fmt: skip
"""A bank on ImageNet; the base learning rate of 1e-3 is per 512 images."""

LOCAL = Settings(
    epochs=1, batch=64, lr=4e-3, augment="crop", crop_scale=0.35, clip=1.0, drop_path=0.0
)  # fmt: skip
"""A bank for one downstream model, on its own images (beyond the paper)."""
LOCAL_STEPS = 600
"""Of which a local bank takes about as many, by as many passes over its images as need be."""

FULL = replace(DISTILL, epochs=30, batch=64, lr=2e-4, warmup_epochs=5, label_smoothing=0.1)
"""All weights, on the fine-grained sets; the paper searches the learning rate from 1e-4 to
5e-3 there."""

ADAPTFORMER = Settings(epochs=100, batch=64, lr=1e-3, weight_decay=1e-4, augment="none")
"""Adapters and head alone, on the thousand images of a VTAB-1k task, which are only resized."""

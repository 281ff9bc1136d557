"""The paper's recipes (section 5.1 and its table of hyper-parameters), as default options."""

from __future__ import annotations

from dataclasses import dataclass

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class Defaults:
    """What a training command does where its options don't say."""

    epochs: int
    batch: int
    lr: float
    """At ``batch`` images a step."""
    weight_decay: float
    warmup: int
    augment: str
    """See :class:`~tocom_export.training.data.train.TrainData`."""
    mixup: float
    cutmix: float
    erasing: float
    label_smoothing: float
    drop_path: float = 0.1


DISTILL = Defaults(
    epochs=10, batch=1024, lr=2e-3, weight_decay=0.05, warmup=0, augment=RAND_AUGMENT,
    mixup=0.8, cutmix=1.0, erasing=0.25, label_smoothing=0.0,
)  # fmt: skip
"""A bank on ImageNet; the base learning rate of 1e-3 is per 512 images."""

FULL = Defaults(
    epochs=30, batch=64, lr=2e-4, weight_decay=0.05, warmup=5, augment=RAND_AUGMENT,
    mixup=0.8, cutmix=1.0, erasing=0.25, label_smoothing=0.1,
)  # fmt: skip
"""All weights, on the fine-grained sets; the paper searches the learning rate from 1e-4 to
5e-3 there."""

ADAPTFORMER = Defaults(
    epochs=100, batch=64, lr=1e-3, weight_decay=1e-4, warmup=0, augment="none",
    mixup=0.0, cutmix=0.0, erasing=0.0, label_smoothing=0.0,
)  # fmt: skip
"""Adapters and head alone, on the thousand images of a VTAB-1k task, which are only resized."""

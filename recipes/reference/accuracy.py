"""Accuracy of a checkpoint at several degrees, with and without its bank.

python recipes/reference/accuracy.py reference.safetensors reference-bank.safetensors \
        data/cifar10/test
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.progress import track

from tocom_export.bank import ToComBank
from tocom_export.checkpoint import Checkpoint
from tocom_export.training.data import eval_loader
from tocom_export.training.evaluate import accuracy
from tocom_export.training.lowrank import TrainableBank
from tocom_export.training.reference import load_model

DEGREES = (0, 4, 8, 12, 16)


def main(checkpoint: Path, bank: Path, images: Path) -> None:
    """Print a Markdown table."""
    opened, steps = Checkpoint.open(checkpoint), ToComBank.load(bank)
    spec, preprocess = opened.info.spec, opened.info.preprocess
    assert spec and preprocess and opened.info.source is not None
    model = load_model(spec, opened.tensors, steps.method)
    side = TrainableBank.from_bank(steps, spec).side
    batches = list(eval_loader(images, spec, preprocess))
    rows = []
    for degree in track(DEGREES, "evaluating"):
        plain = accuracy(model, batches, degree)
        compensated = accuracy(model, batches, degree, side(opened.info.source, degree))
        rows.append(f"| {degree} | {plain:.2f} % | {compensated:.2f} % |")
    print(f"{sum(len(labels) for _, labels in batches)} images\n")
    print("| degree | merging alone | with the bank |\n|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))

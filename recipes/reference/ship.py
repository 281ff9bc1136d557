"""Put the outcome of the program into the package.

python recipes/reference/ship.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.model.catalogue import REFERENCE_BANKS, REFERENCE_CHECKPOINT

LARGEST = 12_000_000
"""Bytes of a backbone in float32; a larger one is shipped in float16."""


def main(out: Path) -> None:
    """The backbone with its metadata, and a bank for each method."""
    backbone = out / "backbone.safetensors"
    with safe_open(backbone, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    if backbone.stat().st_size > LARGEST:
        tensors = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    save_file(tensors, REFERENCE_CHECKPOINT, metadata)
    spec = Checkpoint.open(REFERENCE_CHECKPOINT).info.spec
    assert spec is not None
    for method, file in REFERENCE_BANKS.items():
        bank = ToComBank.load(out / f"{method}-bank.safetensors")
        bank.check(spec, bank.method)
        bank.save(file)
        print(file.name, f"{file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

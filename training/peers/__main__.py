"""The memory of a process that runs one of the peers and nothing else.

python -m tocom_export.training.peers PLACE KIND PRECISION VARIANT DEVICE SHAPE [THREADS] runs it
on zeros of a shape such as 8,3,224,224, and prints what its process takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tocom_export.io.memory import read_memory

from .running import open_run


def main() -> None:
    """Run one of them once, and print what that took."""
    place, kind, precision, variant, device, shape, *threads = sys.argv[1:]
    limit = int(threads[0]) if threads else None
    run = open_run(Path(place), kind, precision, variant, device, limit)  # type: ignore[arg-type]
    run(np.zeros([int(size) for size in shape.split(",")], np.float32))
    print(read_memory())


if __name__ == "__main__":
    main()

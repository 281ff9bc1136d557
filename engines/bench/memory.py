"""What a process takes that runs one variant in ONNX Runtime and nothing else.

python -m tocom_export.engines.bench.memory BUNDLE VARIANT BATCH [THREADS]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tocom_export.bundle.opening import Bundle
from tocom_export.io.memory import measure_memory, read_memory


def measure_variant(
    bundle: Path, variant: str, batch: int, threads: int | None = None
) -> int | None:
    """Bytes (PSS) of a fresh process that runs a bundle's variant on a CPU.

    None where the system doesn't say, or the process failed.
    """
    limit = () if threads is None else (threads,)
    return measure_memory("tocom_export.engines.bench.memory", (bundle, variant, batch, *limit))


def main() -> None:
    """Open an engine, run a batch, and print what that took."""
    from ..verify import sample_images

    path, variant, batch, *threads = sys.argv[1:]
    bundle = Bundle.open(Path(path))
    engine = bundle.engine(variant, threads=int(threads[0]) if threads else None)
    engine.run(sample_images(bundle.spec, int(batch)))
    print(read_memory())


if __name__ == "__main__":
    main()

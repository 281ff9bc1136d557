"""What a process takes that runs one variant and nothing else.

python -m tocom_export.engines.bench.memory BUNDLE VARIANT BATCH [OPTIONS]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tocom_export.bundle.opening import Bundle
from tocom_export.io.memory import measure_memory, read_memory


def measure_variant(bundle: Path, variant: str, batch: int, **options: Any) -> int | None:
    """Bytes (PSS) of a fresh process that runs a bundle's variant on a CPU.

    None where the system doesn't say, or the process failed.

    Args:
        options: of :func:`~tocom_export.engines.opening.open_engine`, as JSON can hold them.
    """
    arguments = (bundle, variant, batch, json.dumps(options))
    return measure_memory("tocom_export.engines.bench.memory", arguments)


def main() -> None:
    """Open an engine, run a batch, and print what that took."""
    from ..verify import sample_images

    path, variant, batch, *options = sys.argv[1:]
    bundle = Bundle.open(Path(path))
    known = json.loads(options[0]) if options else {}
    engine = bundle.engine(variant, batch=[int(batch)], **known)
    engine.run(sample_images(bundle.spec, int(batch)))
    print(read_memory())


if __name__ == "__main__":
    main()

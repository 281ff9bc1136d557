"""What a process takes that runs one engine and nothing else.

python -m tocom_export.io.memory BUNDLE TARGET BATCH [THREADS]
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_ROLLUP = Path("/proc/self/smaps_rollup")


def own_memory() -> int | None:
    """Bytes that this process takes, pages shared with n others counted as an nth (PSS).

    None where the system doesn't say; Linux does.
    """
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", _ROLLUP.read_text("ascii"), re.M)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def give_back() -> None:
    """Return to the system what freed arrays leave behind in the process, where glibc can.

    Without it a pool that is refitted again and again takes twice what its weights need.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_of(module: str, arguments: Sequence[object]) -> int | None:
    """Bytes that a fresh process takes which runs ``python -m module`` and prints them last.

    None where the system doesn't say, or the process failed.
    """
    if own_memory() is None:
        return None
    line = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    last = done.stdout.split()[-1:]
    return int(last[0]) if done.returncode == 0 and last else None


def main() -> None:
    """Open an engine, run a batch, and print what that took."""
    from tocom_export.engines.onnx.engine import OnnxEngine
    from tocom_export.engines.verify import sample_images

    from ..bundle.opening import Bundle

    path, target, batch, *threads = sys.argv[1:]
    bundle = Bundle.open(Path(path))
    engine = OnnxEngine(bundle, int(target), threads=int(threads[0]) if threads else None)
    engine.run(sample_images(bundle.spec, int(batch)))
    print(own_memory())


if __name__ == "__main__":
    main()

"""How much memory a process takes."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_ROLLUP = Path("/proc/self/smaps_rollup")


def read_memory() -> int | None:
    """Bytes that this process takes, pages shared with n others counted as an nth (PSS).

    Other processes that use the same libraries or files make it less, and more when they end.
    None where the system doesn't say; Linux does.
    """
    return _read("Pss", _ROLLUP)


def read_own_memory(rollup: Path | None = None) -> int | None:
    """Bytes that a process has written and no file holds: what grows where something leaks.

    None as above.

    Args:
        rollup: another process's, ``/proc/<pid>/smaps_rollup``, for what that has written.
    """
    return _read("Anonymous", rollup or _ROLLUP)


def _read(name: str, rollup: Path) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", rollup.read_text("ascii"), re.M)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def release_memory() -> None:
    """Return to the system what freed arrays leave behind in the process, where glibc can.

    Without it a pool that is refitted again and again takes twice what its weights need.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure_memory(module: str, arguments: Sequence[object]) -> int | None:
    """Bytes that a fresh process takes which runs ``python -m module`` and prints them last.

    None where the system doesn't say, or the process failed.
    """
    if read_memory() is None:
        return None
    line = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    last = done.stdout.split()[-1:]
    return int(last[0]) if done.returncode == 0 and last else None

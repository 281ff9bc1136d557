"""This machine: its processor, and where it keeps what it has worked out itself.

Plans, compiled models, the backend that was picked: none of it is part of a bundle, and all of it
can be made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any


def find_cache() -> Path | None:
    """``$TOCOM_EXPORT_CACHE``, else ``tocom-export`` in the user's cache folder.

    None for a user without a home: then nothing is kept.
    """
    if named := os.environ.get("TOCOM_EXPORT_CACHE"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "tocom-export"
    try:
        return Path.home() / ".cache" / "tocom-export"
    except RuntimeError:
        return None


def digest(facts: Any) -> str:
    """A file name for what depends on some facts, which JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def name_processor() -> str:
    """``AMD EPYC, 2 cores``."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"

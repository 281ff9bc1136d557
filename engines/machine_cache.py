"""Where a machine keeps what it has worked out itself: plans, compiled models, picks.

Nothing in it is part of a bundle, and all of it can be made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def find_cache() -> Path:
    """``$TOCOM_EXPORT_CACHE``, else ``tocom-export`` in the user's cache folder."""
    if named := os.environ.get("TOCOM_EXPORT_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tocom-export"


def digest(facts: Any) -> str:
    """A file name for what depends on some facts, which JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

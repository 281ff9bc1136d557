"""Compiled models of earlier starts, so that a second start is a file that is mapped.

OpenVINO has a cache of its own, which hashes a model by its weights at every start, or by the
date of its file, which a refit of other files leaves as it is. Here the manifest's hashes name
what was compiled.
"""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import OutputError
from tocom_export.io.atomic import replace_file

from ..machine import digest, find_cache
from .library import Settings, get_version, open_core

LARGEST = 4_000_000_000
"""Bytes of all compiled models together; beyond that the ones unused for longest go."""


def find_place(
    bundle: Bundle, variant: str, settings: Settings, batch: int | None, device: str
) -> Path:
    """Where a variant of a bundle, compiled in this way on this device, is kept."""
    files = (bundle.graph(variant), *bundle.weight_files(variant))
    facts = (
        [bundle.files[file.name].sha256 for file in files],
        dataclasses.asdict(settings),
        batch,
        device,
        get_version(),
    )
    return find_cache() / "openvino" / f"{digest(facts)}.blob"


def load(place: Path, settings: Settings) -> tuple[Any, Any] | None:
    """A compiled model that was kept, and what must outlive it; None where there is none."""
    import openvino

    if not place.exists():
        return None
    try:
        mapped = np.memmap(place, np.uint8, "c")  # OpenVINO refuses read-only memory
        tensor = openvino.Tensor(mapped, shared_memory=True)
        compiled = open_core().import_model(tensor, settings.device, settings.to_config())
        place.touch()
    except (RuntimeError, OSError, ValueError):  # of another build, or damaged: compile anew
        return None
    return compiled, (tensor, mapped)


def keep(compiled: Any, place: Path) -> None:
    """Keep a compiled model, and let go of those that weren't used for longest.

    A place that can't be written, or a device that exports nothing, is no one's fault.
    """
    with suppress(OutputError, OSError, RuntimeError):
        content = compiled.export_model()
        with replace_file(place) as beside:
            beside.write_bytes(content if isinstance(content, bytes) else content.getbuffer())
        kept = sorted(place.parent.glob("*.blob"), key=lambda file: -file.stat().st_mtime)
        total = 0
        for file in kept:
            total += file.stat().st_size
            if total > LARGEST and file != place:
                file.unlink()

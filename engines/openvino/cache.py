"""Compiled models of earlier starts, so that a second start reads a file.

OpenVINO has a cache of its own, which hashes a model by its weights at every start, or by the
date of its file, which a refit of other files leaves as it is. Here the manifest's hashes name
what was compiled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import OutputError
from tocom_export.io.atomic import replace_file

from ..machine import digest, find_cache
from .library import Settings, get_version, open_core

_DIGEST = 32
"""Bytes at the end of a file: the SHA-256 of what comes before."""
_WRITING = 3600.0
"""Seconds after which a file that wasn't renamed was left behind by a process that died."""
LARGEST = 4_000_000_000
"""Bytes of all compiled models together; beyond that the ones unused for longest go."""


def find_place(
    bundle: Bundle, variant: str, settings: Settings, batch: int | None, device: str
) -> Path | None:
    """Where a variant of a bundle, compiled in this way on this device, is kept."""
    cache = find_cache()
    if cache is None:
        return None
    files = (bundle.graph(variant), *bundle.weight_files(variant))
    facts = (
        [bundle.files[file.name].sha256 for file in files],
        dataclasses.asdict(settings),
        batch,
        device,
        get_version(),
    )
    return cache / "openvino" / f"{digest(facts)}.blob"


def load(place: Path, settings: Settings) -> Any | None:
    """A compiled model that was kept; None where there is none, or it is damaged or outdated.

    OpenVINO gets a copy of the file. Given mapped memory it would be a little faster to open, but
    it reads from that for as long as a request of the model's lives, which Python can't promise:
    what is collected in a cycle is let go of in any order.
    """
    try:
        with place.open("rb") as stream:
            plain = stream.read(place.stat().st_size - _DIGEST)
            digest = stream.read()
        if hashlib.sha256(plain).digest() != digest:
            return None  # OpenVINO itself would run it, or crash
        compiled = open_core().import_model(plain, settings.device, settings.to_config())
    except (RuntimeError, OSError, ValueError):
        return None
    with suppress(OSError):  # a cache that is another's to write
        place.touch()
    return compiled


def keep(compiled: Any, place: Path) -> None:
    """Keep a compiled model, and let go of those that weren't used for longest.

    A place that can't be written, or a device that exports nothing, is no one's fault.
    """
    with suppress(OutputError, OSError, RuntimeError):
        content = compiled.export_model()
        with replace_file(place) as beside:
            plain = content if isinstance(content, bytes) else content.getbuffer()
            with beside.open("wb") as stream:
                stream.write(plain)
                stream.write(hashlib.sha256(plain).digest())
    now, total = time.time(), 0
    for used, size, file in sorted(_list_files(place.parent), reverse=True):
        total += size
        broken_off = file.suffix != ".blob" and now - used > _WRITING
        if broken_off or (total > LARGEST and file != place):
            with suppress(OSError):  # another process was faster, or Windows has it mapped
                file.unlink()


def _list_files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Last use, bytes and path of what lies there, half-written files among it."""
    for file in (*folder.glob("*.blob"), *folder.glob(".*.blob.*")):
        with suppress(OSError):
            found = file.stat()
            yield found.st_mtime, found.st_size, file

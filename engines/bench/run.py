"""A bundle's variants timed from Python, beside what one would run instead."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import TocomError

from ..engine import Images
from ..onnx.session import Device
from ..opening import Backend, open_engine
from ..verify import sample_images
from .memory import measure_variant
from .report import Report, Row
from .timing import Timing, time_engines

BATCHES = (1, 8, 32)
SECONDS = 3.0
Tell = Callable[[str], None]


class Peer(Protocol):
    """What a user would run instead of our engines, in float32; as in a :class:`Row`.

    ``run`` takes a batch of normalised images (B, C, H, W) float32; ``memory`` tells of a batch
    the bytes of a process that runs it alone. :mod:`tocom_export.training.peers` opens some.
    """

    name: str
    backend: str
    variant: str
    run: Callable[[Images], Any]
    memory: Callable[[int], int | None]


@dataclass
class _Subject:
    """What is timed: a variant or a peer."""

    about: tuple[str, str, str, str]
    """The first fields of its rows, its name before all."""
    run: Callable[[Images], Any]
    memory: Callable[[int], int | None]
    peer: bool = False


def time_bundle(
    bundle: Bundle,
    variants: Iterable[str | int] | None = None,
    *,
    backend: Backend = "onnx",
    device: Device = "cpu",
    batch: Sequence[int] = BATCHES,
    threads: int | None = None,
    seconds: float = SECONDS,
    host_code: bool = False,
    peers: Sequence[Peer | str] = (),
    progress: Tell = lambda step: None,
) -> Report:
    """Time a bundle's variants and their peers in turns, batch by batch.

    Times include copies to the engine and back. On a CPU, the memory of a process that runs
    each alone is measured, too, at the largest batch.

    Args:
        variants: names or bare degrees; default: all of the bundle.
        device, threads, host_code: of :func:`~tocom_export.engines.opening.open_engine`.
        batch: numbers of images at a time.
        seconds: for each engine at each batch; ten runs at least.
        peers: to be timed beside them; for one that can't be, a line that says why.
        progress: called with what comes next: for each engine and peer once a batch, and once
            more for memory.

    Raises:
        InputError: a batch that a plan doesn't take.
        TocomError: a variant or its plan is missing, or what opening an engine raises.
    """
    names = choose_variants(bundle, variants)
    if backend in ("tensorrt", "tensorrt-rtx"):
        from ..tensorrt.plan import check_batches, open_plan

        for plan in map(bundle.plan, names):
            check_batches(plan, open_plan(plan)[1], batch)
    subjects = []
    for name in names:
        engine = open_engine(
            bundle, bundle.variant(name), backend=backend, device=device, threads=threads,
            host_code=host_code,
        )  # fmt: skip
        measure = partial(measure_variant, bundle.path, name, threads=threads)
        subjects.append(_Subject((name, backend, bundle.precision, name), engine.run, measure))
    for peer in peers:
        if not isinstance(peer, str):
            about = (peer.name, peer.backend, "fp32", peer.variant)
            subjects.append(_Subject(about, peer.run, peer.memory, peer=True))
    batches = [sample_images(bundle.spec, size) for size in sorted(set(batch))]
    timings = [_time(subjects, images, seconds, progress) for images in batches]
    memory: list[int | None] = [None] * len(subjects)
    if (backend, device) == ("onnx", "cpu"):  # beside a GPU it would be the host's part alone
        for number, subject in enumerate(subjects):
            progress(f"{subject.about[0]}, memory")
            memory[number] = subject.memory(max(batch))
    rows = [
        Row(*subject.about, timing, subject.peer, taken)
        for found in timings
        for subject, timing, taken in zip(subjects, found, memory, strict=True)
    ]
    missing = [peer for peer in peers if isinstance(peer, str)]
    return Report(bundle, name_device(backend, device), rows, missing)


def _time(
    subjects: Sequence[_Subject], images: Images, seconds: float, progress: Tell
) -> list[Timing]:
    """Each on the same images, taking turns."""

    def tell(number: int) -> None:
        progress(f"{subjects[number].about[0]}, batch {len(images)}")

    runs = {number: partial(subject.run, images) for number, subject in enumerate(subjects)}
    return list(time_engines(runs, len(images), seconds, tell).values())


def choose_variants(bundle: Bundle, variants: Iterable[str | int] | None) -> list[str]:
    """Full names of some variants, or of all."""
    return [bundle.variant(name).name for name in variants or bundle.variants]


def name_device(backend: str, device: str) -> str:
    """The processor, or the GPU, that engines run on."""
    if (backend, device) != ("onnx", "cpu"):
        from ..tensorrt.cuda import find_gpu

        with suppress(TocomError):  # without cuda-python
            if gpu := find_gpu():
                return gpu.name
        return "GPU"
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"

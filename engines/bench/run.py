"""A bundle's variants timed from Python, beside what one would run instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import TocomError

from ..engine import Images
from ..machine import name_processor
from ..opening import check_backend, open_engine
from ..picking import Choice
from ..verify import sample_images
from .memory import measure_variant
from .report import Report, Row
from .timing import Timing, time_engines

BATCHES = (1, 8, 32)
SECONDS = 3.0
Tell = Callable[[str], None]


class Peer(Protocol):
    """What a user would run instead of our engines; as in a :class:`Row`.

    ``run`` takes a batch of normalised images (B, C, H, W) float32; ``memory`` tells of a batch
    the bytes of a process that runs it alone. :mod:`tocom_export.training.peers` has some.
    """

    name: str
    backend: str
    precision: str
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
    choices: Sequence[Choice] = (Choice("onnx"),),
    device: str | None = None,
    batch: Sequence[int] = BATCHES,
    seconds: float = SECONDS,
    peers: Sequence[Peer | str] = (),
    progress: Tell = lambda step: None,
    **options: Any,
) -> Report:
    """Time a bundle's variants and their peers in turns, batch by batch.

    Times include copies to the engine and back. On a CPU, the memory of a process that runs
    each alone is measured, too, at the largest batch.

    Args:
        variants: names or bare degrees; default: all of the bundle.
        choices: what runs them, each by itself.
        batch: numbers of images at a time.
        seconds: for each engine at each batch; ten runs at least.
        peers: to be timed beside them; for one that can't be, a line that says why.
        progress: called with what comes next: for each engine and peer once a batch, and once
            more for memory.
        device, options: of :func:`~tocom_export.engines.opening.open_engine`.

    Raises:
        InputError: a batch that a plan doesn't take.
        TocomError: a variant or its plan is missing, or what opening an engine raises.
    """
    names = choose_variants(bundle, variants)
    for choice in choices:
        check_backend(choice.backend, device=device, **options)
    subjects = [
        _open_subject(bundle, name, batch, {**choice.options, **options, "device": device})
        for choice in choices
        for name in names
    ]
    for peer in peers:
        if not isinstance(peer, str):
            about = (peer.name, peer.backend, peer.precision, peer.variant)
            subjects.append(_Subject(about, peer.run, peer.memory, peer=True))
    batches = [sample_images(bundle.spec, size) for size in sorted(set(batch))]
    timings = [_time(subjects, images, seconds, progress) for images in batches]
    memory: list[int | None] = [None] * len(subjects)
    on_cpu = runs_on_cpu(choices, device)
    if on_cpu:  # beside a GPU it would be the host's part alone
        for number, subject in enumerate(subjects):
            progress(f"{subject.about[0]}, memory")
            memory[number] = subject.memory(max(batch))
    rows = [
        Row(*subject.about, timing, subject.peer, taken)
        for found in timings
        for subject, timing, taken in zip(subjects, found, memory, strict=True)
    ]
    missing = [peer for peer in peers if isinstance(peer, str)]
    return Report(bundle, _name_device(choices, device), rows, missing)


def _open_subject(
    bundle: Bundle, name: str, batch: Sequence[int], options: dict[str, Any]
) -> _Subject:
    """One variant on one backend."""
    backend = options["backend"]
    if backend in ("tensorrt", "tensorrt-rtx"):
        from ..tensorrt.plan import check_batches, open_plan

        plan = bundle.plan(name)
        check_batches(plan, open_plan(plan)[1], batch)
    engine = open_engine(bundle, bundle.variant(name), batch=batch, **options)
    memory = partial(measure_variant, bundle.path, name, **options)
    return _Subject((name, backend, engine.arithmetic, name), engine.run, memory)


def runs_on_cpu(choices: Iterable[Choice], device: str | None) -> bool:
    """Whether all of these run on this machine's processor."""
    graphs = all(choice.backend in ("onnx", "openvino") for choice in choices)
    return graphs and (device is None or device.lower() == "cpu")


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


def _name_device(choices: Sequence[Choice], device: str | None) -> str:
    if runs_on_cpu(choices, device):
        return name_processor()
    if device and any(choice.backend == "openvino" for choice in choices):
        return device.upper()
    return name_gpu()


def name_gpu() -> str:
    """The GPU that engines run on."""
    from ..tensorrt.cuda import find_gpu

    with suppress(TocomError):  # without cuda-python
        if gpu := find_gpu():
            return gpu.name
    return "GPU"

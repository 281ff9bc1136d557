"""Which peers there are of a bundle, and why one can't be had."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import MissingPackageError, brief
from tocom_export.io.memory import measure_memory
from tocom_export.loading import is_installed
from tocom_export.study.accuracy import Run

from .exporting import EXPORTERS, export_by_torch
from .quantising import QUANTISERS
from .running import Device, Images, Kind, Precision, open_run

STEPS = 19
"""What :func:`open_peers` tells of at most."""
_EXTRA = {"nncf", "onnxscript", "openvino"}
"""Packages that the extra ``peers`` brings."""
_BACKENDS: dict[Kind, str] = {"onnx": "onnx", "openvino": "openvino"}
_NO_BFLOAT16 = "this device has no instructions for bfloat16."


@dataclass
class Peer:
    """One of them, ready to be timed."""

    name: str
    backend: str
    """``torch``, ``onnx`` or ``openvino``: what runs it."""
    precision: Precision
    variant: str
    """The bundle's variant whose tokens it keeps; ``r00`` is the dense model."""
    run: Run
    memory: Callable[[int], int | None]
    """Batch → bytes that a process takes which runs it and nothing else."""


def open_peers(
    bundle: Bundle,
    device: Device,
    threads: int | None,
    folder: Path,
    tell: Callable[[str], None],
    *,
    images: Images,
    batches: Sequence[int] = (1,),
) -> Iterator[Peer | str]:
    """Each of them on the bundle's uncompensated weights; for one that can't be had, why not.

    The dense model in torch and compiled by it, and merging as it is commonly written in the
    variant that costs least, each in float32 and in bfloat16, where the device has it; the dense
    model exported by torch and by Optimum, in ONNX Runtime as it comes. On a CPU also torch's
    export in int8, by ONNX Runtime's own quantiser, and the dense model in OpenVINO: in float32,
    in bfloat16, and in int8 by NNCF.

    Args:
        threads: of each; None leaves it to torch, ONNX Runtime and OpenVINO.
        folder: for what is exported, converted and quantised; it must outlive the peers.
        tell: called with what comes next.
        images: normalised (B, C, H, W), from which quantisers take ranges.
        batches: tried on each, which is compiled for them so.
    """
    if not is_installed("torch", "timm"):
        yield "torch and timm are not installed: there is nothing to compare with."
        return
    opener = _Opener(bundle, device, threads, folder, tell, images, batches)
    yield from _open_torch(opener)
    yield from _open_exported(opener)
    if device == "cpu":
        yield from _open_quantised(opener)
        yield from _open_openvino(opener)


@dataclass(frozen=True)
class _Opener:
    """What all peers of a bundle are opened with."""

    bundle: Bundle
    device: Device
    threads: int | None
    folder: Path
    tell: Callable[[str], None]
    images: Images
    batches: Sequence[int]

    def open(
        self, name: str, kind: Kind, precision: Precision, place: Path, variant: str = "r00"
    ) -> Peer | str:
        """A peer, once it has run each batch."""
        image = self.images.shape[1:]
        arguments = (place, kind, precision, variant, self.device)

        def measure(batch: int) -> int | None:
            shape = ",".join(map(str, (batch, *image)))
            limit = () if self.threads is None else (self.threads,)
            return measure_memory("tocom_export.training.peers", (*arguments, shape, *limit))

        self.tell(name)
        try:
            run = open_run(*arguments, self.threads)
            for batch in self.batches:
                run(np.zeros((batch, *image), np.float32))
        except Exception as error:  # another library's; of the compiler, the lack of one
            return f"{name}: {brief(error)}"
        return Peer(name, _BACKENDS.get(kind, "torch"), precision, variant, run, measure)

    def write(self, name: str, write: Callable[[Path], None], file: str) -> Path | str:
        """A file that another library writes in the folder, or why it doesn't."""
        self.tell(name)
        try:
            with _hush():
                write(self.folder / file)
        except Exception as error:  # another library's, of a model that it may not take
            (self.folder / file).unlink(missing_ok=True)
            return f"{name}: {brief(error)}"
        return self.folder / file


def _open_torch(opener: _Opener) -> Iterator[Peer | str]:
    from .torch_peers import has_bfloat16

    bundle = opener.bundle
    found: list[tuple[str, Kind, str]] = [
        ("torch eager, dense", "eager", "r00"),
        ("torch.compile, dense", "compiled", "r00"),
    ]
    schedules = {name: v.schedule(bundle.spec) for name, v in bundle.variants.items()}
    least = min(schedules, key=lambda name: schedules[name].macs(bundle.spec))
    if bundle.method.name == "tome" and any(schedules[least].removed) and bundle.spec.prefix <= 1:
        found.append((f"torch eager, merging by scatter, {least}", "scatter", least))
    for name, kind, variant in found:
        yield opener.open(f"{name}, fp32", kind, "fp32", bundle.path, variant)
        if has_bfloat16(opener.device):
            yield opener.open(f"{name}, bf16", kind, "bf16", bundle.path, variant)
        else:
            yield f"{name}, bf16: {_NO_BFLOAT16}"


def _open_exported(opener: _Opener) -> Iterator[Peer | str]:
    from ..torch_engine import load_shared

    bundle = opener.bundle
    for name, (needs, export) in EXPORTERS.items():
        if lack := _find_lack(needs):
            yield f"{name}: {lack}"
            continue

        def write(file: Path, export: Callable[..., None] = export) -> None:
            export(load_shared(bundle).vit, bundle.spec, file)

        file = opener.write(name, write, f"{export.__name__}.onnx")
        if isinstance(file, Path):
            yield opener.open(f"{name}, ONNX Runtime, dense, fp32", "onnx", "fp32", file)
        else:
            yield file


def _open_quantised(opener: _Opener) -> Iterator[Peer | str]:
    """From torch's file, where that was written."""
    source = opener.folder / f"{export_by_torch.__name__}.onnx"
    for how, quantise in QUANTISERS.items():
        name = f"ONNX Runtime, dense, {how}"
        if not source.exists():
            yield f"{name}: it starts from what torch.onnx.export writes."
            continue

        def write(file: Path, quantise: Callable[..., None] = quantise) -> None:
            quantise(source, opener.images, file)

        file = opener.write(name, write, f"{quantise.__name__}.onnx")
        yield opener.open(name, "onnx", "int8", file) if isinstance(file, Path) else file


def _open_openvino(opener: _Opener) -> Iterator[Peer | str]:
    from ..torch_engine import load_shared
    from .openvino_peers import convert, has_bfloat16, quantise_by_nncf

    name = "OpenVINO, dense"
    if lack := _find_lack(("openvino",)):
        yield f"{name}: {lack}"
        return
    spec = opener.bundle.spec
    source = opener.write(
        name, lambda file: convert(load_shared(opener.bundle).vit, spec, file), "openvino.xml"
    )
    if isinstance(source, str):
        yield source
        return
    yield opener.open(f"{name}, fp32", "openvino", "fp32", source)
    if has_bfloat16():
        yield opener.open(f"{name}, bf16", "openvino", "bf16", source)
    else:
        yield f"{name}, bf16: {_NO_BFLOAT16}"
    name += ", int8 by NNCF"
    if lack := _find_lack(("nncf",)):
        yield f"{name}: {lack}"
        return
    file = opener.write(
        name, lambda file: quantise_by_nncf(source, opener.images, file), "openvino-int8.xml"
    )
    yield opener.open(name, "openvino", "int8", file) if isinstance(file, Path) else file


def _find_lack(packages: Sequence[str]) -> str | None:
    """What to say where not all of them are installed."""
    if is_installed(*packages):
        return None
    if packages[0] in _EXTRA:
        return str(MissingPackageError(packages[0], "peers"))
    return f"{packages[0]} is not installed."


@contextmanager
def _hush() -> Iterator[None]:
    """Keep other libraries' warnings, bars and logs to themselves."""
    import logging

    handlers, quiet = list(logging.root.handlers), StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(quiet), redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.handlers[:] = handlers  # one that was added writes to what is gone

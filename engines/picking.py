"""Which backend runs a bundle on this machine, where that is left open (``auto``)."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import DeviceError, InputError, MissingPackageError, OutputError
from tocom_export.io.atomic import replace_file
from tocom_export.io.json_codec import decode, encode, format_json, read_json
from tocom_export.loading import is_installed

from .engine import Backend
from .machine import digest, find_cache, name_processor

_LARGEST = 10_000
"""Bytes of a pick's file."""


@dataclass(frozen=True)
class Choice:
    """A backend, and what it computes in where the graph says float32."""

    backend: Backend
    inference_precision: Literal["auto", "f32", "bf16"] = "auto"
    """OpenVINO's alone."""

    def __str__(self) -> str:
        precise = self.inference_precision
        return self.backend if precise == "auto" else f"{self.backend} in {precise}"

    @property
    def options(self) -> dict[str, Any]:
        """As :func:`~tocom_export.engines.opening.open_engine` takes them."""
        return dataclasses.asdict(self)


def list_choices(bundle: Bundle) -> list[Choice]:
    """What could run a bundle on this machine's processor, of what is installed; floats first.

    Raises:
        MissingPackageError: nothing is installed that could.
    """
    choices = []
    # Of bfloat16 ONNX Runtime has no operators on a processor: it would round what float32 gives.
    if is_installed("onnxruntime") and bundle.precision != "bf16":
        choices.append(Choice("onnx"))
    if is_installed("openvino"):
        from .openvino.library import open_core

        with suppress(DeviceError):  # too old, or it can't be imported
            can = open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            known = [Choice("openvino", "f32")] + [Choice("openvino", "bf16")] * ("BF16" in can)
            choices += known[-1:] if bundle.precision == "bf16" else known
    if not choices:
        raise MissingPackageError("onnxruntime", "cpu")
    return choices


def choose(bundle: Bundle, device: str | None = None) -> Choice:
    """What ``auto`` stands for: what was picked on this machine, else what computes in float32.

    That is ONNX Runtime, or OpenVINO where that alone is installed.

    Args:
        device: where it shall run; one that only one of them knows decides.
    """
    if device is not None and device.lower() != "cpu":
        return Choice("onnx" if device.lower() in ("cuda", "tensorrt") else "openvino")
    if (picked := find_pick(bundle)) is not None:
        return picked
    if not is_installed("onnxruntime") and is_installed("openvino"):
        return Choice("openvino", "f32")
    return Choice("onnx")


@dataclass(frozen=True)
class _Pick:
    """What is kept of a pick; the first two for people."""

    bundle: str
    processor: str
    choice: Choice


def find_pick(bundle: Bundle) -> Choice | None:
    """What was picked for a bundle on this machine; None where it can't be had (any longer)."""
    place = _find_place(bundle)
    if place is None or not place.exists():
        return None
    try:
        found = decode(_Pick, read_json(place, _LARGEST)).choice
        return found if found in list_choices(bundle) else None
    except (OSError, InputError):
        return None


def keep_pick(bundle: Bundle, choice: Choice) -> Path:
    """Let ``auto`` stand for this choice from now on, for this bundle on this machine.

    Raises:
        OutputError: the machine's cache can't be written.
    """
    place = check_can_keep(bundle)
    facts = _Pick(str(bundle.path.resolve()), name_processor(), choice)
    with replace_file(place) as beside:
        beside.write_text(format_json(encode(facts)), "utf-8")
    return place


def check_can_keep(bundle: Bundle) -> Path:
    """Where a bundle's pick is kept; raises OutputError where nothing can be written there."""
    place = _find_place(bundle)
    if place is None:
        raise OutputError("there is no home to keep it in; name a folder in TOCOM_EXPORT_CACHE.")
    with replace_file(place.with_suffix(".probe")) as beside:
        beside.touch()
    place.with_suffix(".probe").unlink(missing_ok=True)
    return place


def resolve(
    bundle: Bundle, backend: Backend | Literal["auto"], device: str | None, precision: Any
) -> tuple[Backend, Any]:
    """A backend that may be left open, and OpenVINO's precision, made definite.

    Args:
        precision: what was asked for; OpenVINO alone can be asked for one.
    """
    if backend != "auto":
        return backend, precision
    if precision != "auto":
        return "openvino", precision
    found = choose(bundle, device)
    return found.backend, found.inference_precision


def _find_place(bundle: Bundle) -> Path | None:
    """Named after the bundle's files, so that other weights want a new pick, and the processor."""
    cache = find_cache()
    files = sorted(record.sha256 for record in bundle.files.values())
    return cache and cache / "picks" / f"{digest((files, name_processor()))}.json"

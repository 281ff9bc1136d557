"""Which backend runs a bundle on this machine, where that is left open (``auto``)."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import BundleError, InputError, MissingPackageError
from tocom_export.io.atomic import replace_file
from tocom_export.io.json_codec import decode, format_json, read_json
from tocom_export.loading import is_installed

from .engine import Backend
from .machine import digest, find_cache, name_processor

_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
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
    """What could run a bundle on this machine's processor, of what is installed.

    Raises:
        MissingPackageError: nothing is installed that could.
    """
    choices = []
    # Of bfloat16 ONNX Runtime has no operators on a processor: it would round what float32 gives.
    if is_installed("onnxruntime") and bundle.precision != "bf16":
        choices.append(Choice("onnx"))
    if is_installed("openvino"):
        from .openvino.library import open_core

        can = open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        known = [Choice("openvino", "f32")] + [Choice("openvino", "bf16")] * ("BF16" in can)
        choices += known[-1:] if bundle.precision == "bf16" else known
    if not choices:
        raise MissingPackageError("onnxruntime", "cpu")
    return choices


def choose(bundle: Bundle, device: str | None = None) -> Choice:
    """What ``auto`` stands for: what was picked on this machine, else what agrees to the last bit.

    That is ONNX Runtime, or OpenVINO in float32 where that alone is installed.

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


def find_pick(bundle: Bundle) -> Choice | None:
    """What was picked for a bundle on this machine; None where nothing was that is installed."""
    with suppress(OSError, InputError, BundleError):
        found = decode(Choice, read_json(_find_place(bundle), _LARGEST)["choice"])
        return found if is_installed(_PACKAGES.get(found.backend, found.backend)) else None
    return None


def keep_pick(bundle: Bundle, choice: Choice) -> Path:
    """Let ``auto`` stand for this choice from now on, for this bundle on this machine.

    Raises:
        OutputError: the machine's cache can't be written.
    """
    place = _find_place(bundle)
    facts = {"bundle": str(bundle.path), "processor": name_processor(), "choice": choice.options}
    with replace_file(place) as beside:
        beside.write_text(format_json(facts), "utf-8")
    return place


def resolve(
    bundle: Bundle, backend: Backend | Literal["auto"], device: str | None, precision: Any
) -> tuple[Backend, Any]:
    """A backend that may be left open, and OpenVINO's precision, made definite.

    Args:
        precision: what was asked for; what was picked stands in for ``auto`` alone.
    """
    if backend != "auto":
        return backend, precision
    found = choose(bundle, device)
    return found.backend, found.inference_precision if precision == "auto" else precision


def _find_place(bundle: Bundle) -> Path:
    """Named after the graphs, which a refit leaves as they are, and the processor."""
    graphs = sorted(bundle.files[bundle.graph(name).name].sha256 for name in bundle.variants)
    return find_cache() / "picks" / f"{digest((graphs, name_processor()))}.json"

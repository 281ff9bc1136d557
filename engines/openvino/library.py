"""OpenVINO itself: its core, its devices, and what these can do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from tocom_export.errors import DeviceError, InputError, MissingPackageError, brief
from tocom_export.io.telemetry import decline_telemetry

InferencePrecision = Literal["auto", "f32", "bf16"]
Hint = Literal["latency", "throughput"]
OLDEST = (2025, 2)
"""The first release that reads our graphs and imports what it exported from mapped memory."""
_CAPABILITIES = {"f32": "FP32", "bf16": "BF16"}


@dataclass(frozen=True)
class Settings:
    """How OpenVINO is to run a model."""

    device: str = "CPU"
    """CPU, GPU, GPU.1, NPU, AUTO, ..."""
    precision: InferencePrecision = "auto"
    """What it computes in where the graph says float32; auto leaves it to the device."""
    hint: Hint = "latency"
    threads: int | None = None
    """Of all its streams; None leaves it to OpenVINO."""
    streams: int | None = None
    """Runs side by side; None leaves it to the hint."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.device.upper())
        if self.precision not in (known := get_args(InferencePrecision)):
            raise InputError(f"`inference_precision` {self.precision!r}: it is {', '.join(known)}.")
        if self.hint not in (hints := get_args(Hint)):
            raise InputError(f"`hint` {self.hint!r}: it is {' or '.join(hints)}.")
        for name in ("threads", "streams"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise InputError(f"`{name}` {count}: there is one at least.")

    def to_config(self) -> dict[str, Any]:
        """As OpenVINO's properties."""
        config: dict[str, Any] = {"PERFORMANCE_HINT": self.hint.upper()}
        if self.precision != "auto":
            config["INFERENCE_PRECISION_HINT"] = self.precision
        if self.threads is not None:
            config["INFERENCE_NUM_THREADS"] = self.threads
        if self.streams is not None:
            config["NUM_STREAMS"] = self.streams
        return config


@cache
def open_core() -> Any:
    """OpenVINO's core, one for the process.

    One that is never let go: a core gives its thread a stack for signals, and where several come
    and go the thread may be left with one that is gone, so that Ctrl-C crashes the process.

    Raises:
        MissingPackageError: it is not installed, or too old.
    """
    decline_telemetry()
    try:
        import openvino
    except ModuleNotFoundError:
        raise MissingPackageError("openvino", "openvino") from None
    except ImportError as error:  # one of its libraries
        raise DeviceError(f"openvino can't be imported ({brief(error)}).") from error
    version = get_version()
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise DeviceError(
            f"openvino {version} is too old; {oldest} or newer is needed: pip install -U openvino."
        )
    return openvino.Core()


def get_version() -> str:
    """``2026.4.1`` of ``2026.4.1-22982-e213a147257-releases/2026/4``."""
    import openvino

    return str(openvino.__version__).partition("-")[0]


def explain(error: BaseException) -> str:
    """What is wrong, of an error whose first lines say where in OpenVINO's source it is."""
    lines = (line.strip() for line in str(error).splitlines())
    says = [x for x in lines if x and not re.match(r"Exception from|Check .* failed|\[", x)]
    return brief(RuntimeError(says[0])) if says else brief(error)


def check_device(settings: Settings) -> str:
    """The full name of the device that is asked for.

    Raises:
        DeviceError: it isn't there, or can't compute in the precision that is asked for.
    """
    core, device = open_core(), settings.device
    have = list(core.available_devices)
    kinds = {name.partition(".")[0] for name in have}
    if device == "AUTO" and have:
        return "AUTO"
    if device not in have and device not in kinds:
        raise DeviceError(
            f"`device` {device}: OpenVINO {get_version()} finds {', '.join(have) or 'none'} here, "
            "or AUTO, which is the best of them."
        )
    try:
        name = str(core.get_property(device, "FULL_DEVICE_NAME"))
        can = list(core.get_property(device, "OPTIMIZATION_CAPABILITIES"))
    except RuntimeError as error:
        why = explain(error)
        raise DeviceError(f"`device` {device}: OpenVINO can't use it ({why}).") from error
    wanted = settings.precision
    if wanted != "auto" and _CAPABILITIES[wanted] not in can:
        able = [ours for ours, theirs in _CAPABILITIES.items() if theirs in can]
        raise DeviceError(
            f"`inference_precision` {wanted}: {name.strip()} can't compute in it; it has "
            f"{', '.join(able)}, and auto takes the fastest."
        )
    return name.strip()

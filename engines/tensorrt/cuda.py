"""The little of CUDA's runtime that plans need, by cuda-python; errors are exceptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tocom_export.errors import DeviceError, MissingPackageError

_HINTS = {
    2: "; lower the batch, or free memory on the GPU",
    35: "; with a driver for CUDA 12: pip install 'cuda-python<13'",
}
"""CUDA's number of an error → what to do about it."""


@dataclass(frozen=True)
class Gpu:
    """The device that CUDA uses by default."""

    name: str
    capability: tuple[int, int]


def runtime() -> Any:
    """The module ``cuda.bindings.runtime``; raises MissingPackageError without cuda-python."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise MissingPackageError("cuda-python", "tensorrt") from None
    return runtime


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the runtime: its one result, or None; raises DeviceError for an error."""
    status, *results = function(*arguments)
    if int(status):
        raise DeviceError(f"CUDA: {_told(status, f' ({function.__name__})')}.")
    return results[0] if results else None


def find_gpu() -> Gpu | None:
    """The GPU, or None where CUDA can't use one; :func:`why_no_gpu` says why."""
    cuda = runtime()
    status, count = cuda.cudaGetDeviceCount()
    if int(status) or not count:
        return None
    properties = call(cuda.cudaGetDeviceProperties, call(cuda.cudaGetDevice))
    return Gpu(_decode(properties.name), (int(properties.major), int(properties.minor)))


def why_no_gpu() -> str:
    """What CUDA says where :func:`find_gpu` finds none."""
    status, _ = runtime().cudaGetDeviceCount()
    return _told(status) if int(status) else "it counts no device"


def _told(status: Any, where: str = "") -> str:
    text = _decode(runtime().cudaGetErrorString(status)[1])
    return text + where + _HINTS.get(int(status), "")


def _decode(text: Any) -> str:
    return text.decode().rstrip("\0") if isinstance(text, bytes) else str(text)

"""The little of CUDA's runtime that plans need, by cuda-python; errors are exceptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tocom_export.errors import DeviceError, MissingPackageError


@dataclass(frozen=True)
class Gpu:
    """The device that CUDA uses by default."""

    name: str
    capability: tuple[int, int]
    """Compute capability, such as (8, 9)."""


def runtime() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises:
        MissingPackageError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise MissingPackageError("cuda-python", "tensorrt") from None
    return runtime


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of the runtime: its one result, a tuple of several, or None.

    Raises:
        DeviceError: it returned an error.
    """
    status, *results = function(*arguments)
    if int(status):
        raise DeviceError(f"CUDA: {_told(status)} ({function.__name__}){_hint(status)}.")
    if len(results) > 1:
        return tuple(results)
    return results[0] if results else None


def find_gpu() -> Gpu | None:
    """The GPU, or None where CUDA can't use one; :func:`why_no_gpu` says why.

    Raises:
        MissingPackageError: cuda-python is not installed.
    """
    cuda = runtime()
    status, count = cuda.cudaGetDeviceCount()
    if int(status) or not count:
        return None
    properties = call(cuda.cudaGetDeviceProperties, call(cuda.cudaGetDevice))
    name = properties.name
    return Gpu(
        name.decode().rstrip("\0") if isinstance(name, bytes) else str(name),
        (int(properties.major), int(properties.minor)),
    )


def why_no_gpu() -> str:
    """What CUDA says where :func:`find_gpu` finds none."""
    status, _ = runtime().cudaGetDeviceCount()
    return _told(status) + _hint(status) if int(status) else "it counts no device"


def _hint(status: Any) -> str:
    """What to do about an error, where something can be done."""
    return {
        2: "; lower the batch, or free memory on the GPU",
        35: "; with a driver for CUDA 12: pip install 'cuda-python<13'",
    }.get(int(status), "")


def _told(status: Any) -> str:
    told = runtime().cudaGetErrorString(status)[1]
    return told.decode() if isinstance(told, bytes) else str(told)

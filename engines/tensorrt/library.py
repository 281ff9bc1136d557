"""TensorRT and TensorRT-RTX, which offer the same names: the library is a parameter."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tocom_export.errors import MissingPackageError, PlanError, brief

Library = Literal["tensorrt", "tensorrt-rtx"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
_KNOWN: dict[Library, tuple[str, str, tuple[int, int], int]] = {
    "tensorrt": ("tensorrt", "tensorrt", (10, 0), 11),
    "tensorrt-rtx": ("tensorrt_rtx", "rtx", (1, 7), 1),
}
"""Module, the extra that installs it, its first version that has what we call, its last major."""
_LOGGERS: dict[Library, Any] = {}


@dataclass(frozen=True)
class Nvidia:
    """One of the two libraries, imported, and a logger of ours for it."""

    library: Library
    trt: Any
    """The module."""
    logger: Any
    """Its ``errors`` are what the library called so since it was opened."""

    @property
    def version(self) -> str:
        """As the library gives it, such as 10.3.0."""
        return str(self.trt.__version__)

    @property
    def release(self) -> tuple[int, ...]:
        """Of the version the first two numbers."""
        return _read_release(self.version)

    def reason(self, otherwise: str = "no reason given") -> str:
        """What the library last said was wrong, in a line."""
        text = next(reversed(self.logger.errors), otherwise)
        return re.sub(r"\s+", " ", text)[:200].rstrip(". ")


def open_library(library: Library, tell: Callable[[str], None] | None = None) -> Nvidia:
    """Import a library.

    Args:
        tell: called from now on with each message of the library's that is not an error; None
            leaves it as it was.

    Raises:
        MissingPackageError: it is not installed.
        PlanError: it can't be loaded, or its version is not one that we know.
    """
    module, extra, first, last = _KNOWN[library]
    try:
        trt = importlib.import_module(module)
    except (ImportError, OSError) as error:
        if isinstance(error, ImportError) and error.name == module:
            raise MissingPackageError(module, extra) from None
        raise PlanError(
            f"{module} is installed, but can't be loaded ({brief(error)}); install it again with "
            f"what it needs: pip install --force-reinstall 'tocom-export[{extra}]'."
        ) from None
    version = str(trt.__version__)
    if not first <= _read_release(version) < (last + 1, 0):
        wanted = f"{first[0]}.{first[1]} to {last}.x"
        raise PlanError(f"{module} {version} is installed; {wanted} are supported.")
    # A process has one logger for all: TensorRT goes on with the first that it is given.
    logger = _LOGGERS.get(library)
    if not isinstance(logger, trt.ILogger):
        logger = _LOGGERS[library] = _make_logger(trt)
    if tell:
        logger.tell = tell
    logger.errors.clear()
    return Nvidia(library, trt, logger)


def _read_release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))  # 10.13.3, 1.7.1.116


def _make_logger(trt: Any) -> Any:
    """An ``ILogger`` that keeps errors and passes the rest on."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.tell: Callable[[str], None] = lambda _: None

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity in (trt.ILogger.WARNING, trt.ILogger.INFO):
                self.tell(message)

    return Logger()

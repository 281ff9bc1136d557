"""TensorRT and TensorRT-RTX, which offer the same names: the library is a parameter."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tocom_export.errors import MissingPackageError, PlanError, brief

Library = Literal["tensorrt", "tensorrt-rtx"]
LIBRARIES: tuple[Library, ...] = ("tensorrt", "tensorrt-rtx")
_MODULES: dict[Library, tuple[str, str]] = {
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
}
"""Module, and the extra that installs it."""
_SUPPORTED: dict[Library, tuple[tuple[int, int], int]] = {
    "tensorrt": ((10, 0), 11),
    "tensorrt-rtx": ((1, 7), 1),
}
"""First version, and last major one; earlier ones lack functions that we call."""


@dataclass(frozen=True)
class Nvidia:
    """One of the two libraries, imported, and a logger of ours for it."""

    library: Library
    trt: Any
    """The module."""
    logger: Any
    errors: list[str]
    """What the library called an error since it was opened."""

    @property
    def version(self) -> str:
        """As the library gives it, such as 10.3.0."""
        return str(self.trt.__version__)

    def reason(self, otherwise: str) -> str:
        """What the library last said was wrong, in a line."""
        text = self.errors[-1] if self.errors else otherwise
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
    module, extra = _MODULES[library]
    try:
        trt = importlib.import_module(module)
    except (ImportError, OSError) as error:
        if isinstance(error, ImportError) and error.name == module:
            raise MissingPackageError(module, extra) from None
        raise PlanError(
            f"{module} is installed, but can't be loaded ({brief(error)}); install it again with "
            f"what it needs: pip install --force-reinstall 'tocom-export[{extra}]'."
        ) from None
    first, last = _SUPPORTED[library]
    version = str(trt.__version__)
    if not (first <= version_of(version) < (last + 1, 0)):
        wanted = f"{first[0]}.{first[1]} to {last}.x"
        raise PlanError(f"{module} {version} is installed; {wanted} are supported.")
    # A process has one logger for all: TensorRT goes on with the first that it is given.
    if _LOGGERS.get(library, (None,))[0] is not trt:
        _LOGGERS[library] = (trt, _logger(trt))
    logger = _LOGGERS[library][1]
    if tell:
        logger.tell = tell
    logger.errors.clear()
    return Nvidia(library, trt, logger, logger.errors)


def version_of(text: str) -> tuple[int, int]:
    """Major and minor number of a version such as 10.13.3; zeros where it is none."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


_LOGGERS: dict[Library, tuple[Any, Any]] = {}


def _logger(trt: Any) -> Any:
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

"""From what a user names to models that are served."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_export.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    from .service import ServeOptions, Service

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_NEEDED = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}


def check_installed() -> None:
    """Raise MissingPackageError where a server's packages are not installed."""
    for module, package in _NEEDED.items():
        if find_spec(module) is None:
            raise MissingPackageError(package, "serve")


def name_bundles(texts: Sequence[str]) -> dict[str, Path]:
    """Name → bundle, of ``PATH`` or ``NAME=PATH`` each.

    Raises:
        InputError: a folder's name can't be a model's, or two are called the same.
    """
    named: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            path = text
            name = Path(text).resolve().name
        if not _NAME.fullmatch(name) or name in (".", "..", "stats"):
            raise InputError(
                f"{name!r} can't name a model: letters, digits, '.', '-' and '_'; write "
                f"NAME={path}."
            )
        if name in named:
            raise InputError(f"two models are called {name}; write NAME={path} for one of them.")
        named[name] = Path(path)
    return named


def open_services(
    named: Mapping[str, Path],
    options: ServeOptions,
    advance: Callable[[str], None] = lambda name: None,
    **engine: Any,
) -> dict[str, Service]:
    """Models that are served, by their names; those that are open are closed where one fails.

    Args:
        engine: backend, device, threads and the like, as of :class:`EnginePool`.

    Raises:
        TocomError: a bundle can't be opened.
    """
    from .service import Service

    services: dict[str, Service] = {}
    try:
        for name, path in named.items():
            advance(name)
            services[name] = Service.open(name, path, options, **engine)
    except BaseException:
        for service in services.values():
            service.close()
        raise
    return services

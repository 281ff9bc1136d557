"""From what a user names to models that are served."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_export.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    from .serve_options import ServeOptions
    from .service import Service

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
        if not path:
            raise InputError(f"{text!r} names no bundle; write {name or 'NAME'}=BUNDLE.")
        place = shlex.quote(str(path))
        if not _NAME.fullmatch(name) or name in (".", "..", "stats"):
            raise InputError(
                f"{name!r} can't name a model: letters, digits, '.', '-' and '_'; write "
                f"NAME={place}."
            )
        if name in named:
            raise InputError(f"two models are called {name}; write NAME={place} for one of them.")
        named[name] = Path(path)
    return named


def open_services(
    named: Mapping[str, Path],
    options: ServeOptions,
    tell: Callable[[str], None] = lambda name: None,
    **engine: Any,
) -> dict[str, Service]:
    """Models that are served, by their names; those that are open are closed where one fails.

    Args:
        tell: called with a name before its variants are timed.
        engine: backend, device, threads and the like, as of :class:`EnginePool`.

    Raises:
        TocomError: a bundle can't be opened.
    """
    from .service import Service

    services: dict[str, Service] = {}
    try:
        for name, path in named.items():
            services[name] = Service.open(name, path, options, partial(tell, name), **engine)
    except BaseException:
        for service in services.values():
            service.close()
        raise
    return services

"""What an administrator may ask for: another variant in force, other weights, the files again."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tocom_export.errors import DegreeError, InputError, TocomError
from tocom_export.io.reading import open_regular

from .bodies import hold_body
from .documents import describe_serving
from .refusals import CLOSE, Refusal, refuse
from .service import Service
from .site import Site
from .telling import log, name_client, name_place
from .writing import write_json

_LARGEST = 16_384
_SHORTEST, _LONGEST = 16, 4096
"""Characters of a token."""
T = TypeVar("T", bound=msgspec.Struct)


class _Switch(msgspec.Struct, forbid_unknown_fields=True):
    variant: str | int | None


class _Refit(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    checkpoint: str | None = None
    weights_key: str | None = None
    bank: str | None = None
    source: int | None = None
    scale: float | None = None


class _Reload(msgspec.Struct, forbid_unknown_fields=True):
    pass


def read_token(file: Path) -> str:
    """The token in a file, without the white space around it.

    Raises:
        InputError: it can't be read, or holds no token of 16 characters and more.
    """
    try:
        with open_regular(file) as stream:
            token = stream.read(_LONGEST + 1).decode("ascii").strip()
    except OSError as error:
        raise InputError(f"`admin_token_file` {file}: can't be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        token = ""
    if not (_SHORTEST <= len(token) <= _LONGEST and token.isprintable() and " " not in token):
        raise InputError(
            f"`admin_token_file` {file}: a word of {_SHORTEST} to {_LONGEST} ASCII characters is "
            "expected (openssl rand -hex 32 > FILE)."
        )
    return token


def is_open_to_others(file: Path) -> bool:
    """Whether other users of this machine may read a file."""
    return os.name == "posix" and bool(file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))


async def switch(service: Service, wish: _Switch) -> None:
    """``POST /admin/models/{m}/switch``: ``{"variant": "r08"}``; null lets the policy choose."""
    try:
        service.pin(None if wish.variant is None else str(wish.variant))
    except DegreeError as error:
        raise refuse(error, service.paths) from None


async def refit(service: Service, wish: _Refit) -> None:
    """``POST /admin/models/{m}/refit``: ``checkpoint``, ``bank``, ``source``, ``scale``."""
    new = msgspec.to_builtins(wish)
    if not new:
        raise Refusal(400, "say what is to change: checkpoint, bank, source or scale.")
    if "weights_key" in new and "checkpoint" not in new:
        raise Refusal(400, "weights_key is of a checkpoint; name that, too.")
    paths = [new[name] for name in ("checkpoint", "bank") if name in new]
    if any("\0" in path for path in paths):
        raise Refusal(400, "a file's name holds no NUL.")
    named = {told: Path(path).name for path in paths for told in (path, str(Path(path)))}
    await _change(service, partial(service.refit, **new), named)


async def reload(service: Service, wish: _Reload) -> None:
    """``POST /admin/models/{m}/reload``."""
    await _change(service, service.reload, {})


async def _carry_out(
    kind: type[T], change: Callable[[Service, T], Awaitable[None]], site: Site, request: Request
) -> Response:
    """What all of them have in common: who may, and what the log says."""
    service = _authorise(site, request)
    name, who, began = change.__name__, name_client(request), time.monotonic()
    try:
        wish = await _read(site, request, kind)
        name = f"{name} {json.dumps(msgspec.to_builtins(wish))}"
        await change(service, wish)
    except Refusal as refusal:
        log.warning("%s: %s by %s was refused: %s", service.name, name, who, refusal.text)
        raise
    log.info(
        "%s: %s by %s, in %.1f s; in force is %s, of %s",
        service.name, name, who, time.monotonic() - began, service.control.variant,
        ", ".join(service.pool.variants),
    )  # fmt: skip
    return write_json(describe_serving(service))


HANDLERS: Mapping[str, Callable[[Site, Request], Awaitable[Response]]] = {
    "switch": partial(_carry_out, _Switch, switch),
    "refit": partial(_carry_out, _Refit, refit),
    "reload": partial(_carry_out, _Reload, reload),
}
"""By the last part of their addresses."""


def _authorise(site: Site, request: Request) -> Service:
    """Raise Refusal where a request isn't an administrator's; else the model that it names."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    known = (site.token or "").encode()
    right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), known)
    if not (right and known and scheme.lower() == "bearer"):
        site.strangers.warn(
            "%s: no administrator's token, for %s", name_client(request), name_place(request)
        )
        raise Refusal(401, "a Bearer token is needed.", {"WWW-Authenticate": "Bearer", **CLOSE})
    site.check_open()
    return site.find(request.path_params["model"])


async def _read(site: Site, request: Request, kind: type[T]) -> T:
    receive, headers = request.receive, request.headers
    async with hold_body(receive, headers, _LARGEST, site.budget, site.executor) as body:
        try:
            return msgspec.json.decode(body or b"{}", type=kind)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise Refusal(400, f"the request's JSON is not as expected: {error}.") from None


async def _change(service: Service, change: Any, named: dict[str, str]) -> None:
    """Carry out what takes seconds, beside the event loop."""
    try:
        await asyncio.to_thread(change)
    except TocomError as error:
        raise refuse(error, {**service.paths, **named}) from None
    except OSError as error:
        raise Refusal(400, f"a file can't be read: {error.strerror}.") from None

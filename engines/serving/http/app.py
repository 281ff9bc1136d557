"""The addresses of a server, and what every answer has in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tocom_export.errors import TocomError

from . import about, admin, asking, pages, patches
from .line import refuse_stopping
from .refusals import CLOSE, Gone, Refusal, refuse
from .site import Site
from .telling import log, note_request
from .writing import write_refusal

Handler = Callable[[Site, Request], Awaitable[Response]]
_MODEL = "/v2/models/{model}"
_VERSION = _MODEL + "/versions/{version}"


def build_app(site: Site) -> Starlette:
    """The ASGI application of a server."""
    routes = [
        *_add("/v2", about.tell_server),
        *_add("/v2/health/live", about.tell_live),
        *_add("/v2/health/ready", about.tell_ready),
        *_add("/v2/models/stats", about.tell_all_statistics),
        *_add("/v2/repository/index", about.tell_repository, "POST"),
        *_add("/metrics", about.tell_metrics),
        *_add("/stats", about.tell_serving),
        *_add("/", pages.show_page),
        *_add("/page/{name}", pages.show_part),
        *_add(f"{_VERSION}/patches", patches.show_patches, "POST"),
    ]
    for place in (_MODEL, _VERSION):
        routes += [
            *_add(place, about.tell_model),
            *_add(f"{place}/ready", about.tell_model_ready),
            *_add(f"{place}/config", about.tell_config),
            *_add(f"{place}/stats", about.tell_statistics),
            *_add(f"{place}/infer", asking.infer, "POST"),
            *_add(f"{place}/classify", asking.classify, "POST"),
        ]
    if site.token is not None:
        for name, handler in admin.HANDLERS.items():
            routes += _add(f"/admin/models/{{model}}/{name}", handler, "POST")
    for place in about.UNSUPPORTED:
        routes += _add(place, about.refuse_unsupported, "GET", "POST")
    app = Starlette(routes=routes, exception_handlers={HTTPException: _answer_http})
    app.router.redirect_slashes = False
    app.state.site = site
    return app


def _add(path: str, handler: Handler, *methods: str) -> list[Route]:
    return [Route(path, _guard(handler), methods=methods or ("GET",))]


def _guard(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """A handler that gives an answer whatever happens, and counts while it works."""

    async def call(request: Request) -> Response:
        site: Site = request.app.state.site
        asks = request.method == "POST"  # not who looks every second whether it is ready
        site.working += asks
        began = time.monotonic()
        try:
            response = await _answer(handler, site, request)
            note_request(request, response.status_code, began)
            if site.stopping:
                response.headers.update(CLOSE)
            return response
        finally:
            site.working -= asks
            if asks:
                site.worked = time.monotonic()

    return call


async def _answer(handler: Handler, site: Site, request: Request) -> Response:
    try:
        if {"content-length", "transfer-encoding"} <= set(request.headers):
            # What is before us may have gone by the other one, and see two requests here.
            raise Refusal(400, "Content-Length and Transfer-Encoding don't go together.", CLOSE)
        return await handler(site, request)
    except Refusal as refusal:
        return write_refusal(refusal)
    except asyncio.CancelledError:
        if not site.stopping:
            raise
        return write_refusal(refuse_stopping())  # a second signal ended the wait
    except Gone:
        return Response(status_code=499)  # to nobody
    except TocomError as error:
        log.error("%r: %s", request.url.path, error)
        return write_refusal(refuse(error))
    except Exception:
        log.exception("%r failed", request.url.path)
        return write_refusal(Refusal(500, "the server failed; its log says how."))


async def _answer_http(request: Request, error: Exception) -> Response:
    """No such address, or not by this method."""
    assert isinstance(error, HTTPException)
    text = {404: "there is nothing here.", 405: f"not by {request.method}."}
    note_request(request, error.status_code, time.monotonic())
    refusal = Refusal(error.status_code, text.get(error.status_code, error.detail), error.headers)
    return write_refusal(refusal)

"""Handlers of the page that shows what is served, and of its scripts."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from .refusals import Refusal
from .site import Site

_KINDS = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "picture.js": "text/javascript; charset=utf-8",
}
"""What there is of the page, and nothing else."""
_HEADERS = {
    # Nothing from elsewhere, and in nobody's frame; pictures are data of our own answers.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def show_page(site: Site, request: Request) -> Response:
    """``GET /``."""
    return _answer("index.html")


async def show_part(site: Site, request: Request) -> Response:
    """``GET /page/{name}``."""
    return _answer(request.path_params["name"])


def _answer(name: str) -> Response:
    if name not in _KINDS:
        raise Refusal(404, "there is nothing here.")
    return Response(_read(name), headers={**_HEADERS, "Content-Type": _KINDS[name]})


@cache
def _read(name: str) -> bytes:
    return files(__package__).joinpath("page").joinpath(name).read_bytes()

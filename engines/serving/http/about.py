"""Handlers that tell what is served, and how it goes."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from tocom_export._version import __version__

from . import documents, metrics
from .refusals import Refusal
from .service import Service
from .site import Site
from .writing import write_json

UNSUPPORTED = (
    "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}",
    "/v2/repository/models/{rest:path}",
    "/v2/trace/{rest:path}",
    "/v2/logging",
)
"""Of Triton's addresses, those for what this server doesn't do."""


async def tell_server(site: Site, request: Request) -> Response:
    """``GET /v2``."""
    return write_json(documents.describe_server())


async def tell_live(site: Site, request: Request) -> Response:
    """``GET /v2/health/live``."""
    return write_json({"live": True})


async def tell_ready(site: Site, request: Request) -> Response:
    """``GET /v2/health/ready``."""
    ready = not site.stopping and all(service.alive for service in site.services.values())
    return write_json({"ready": ready}, 200 if ready else 503)


async def tell_model(site: Site, request: Request) -> Response:
    """``GET /v2/models/{m}[/versions/{v}]``."""
    service, versions = _find(site, request)
    return write_json(documents.describe_model(service, versions))


async def tell_model_ready(site: Site, request: Request) -> Response:
    """``GET /v2/models/{m}[/versions/{v}]/ready``."""
    service, _ = _find(site, request)
    ready = service.alive and not site.stopping
    return write_json({"name": service.name, "ready": ready}, 200 if ready else 503)


async def tell_config(site: Site, request: Request) -> Response:
    """``GET /v2/models/{m}[/versions/{v}]/config``."""
    return write_json(documents.describe_config(_find(site, request)[0]))


async def tell_statistics(site: Site, request: Request) -> Response:
    """``GET /v2/models/{m}[/versions/{v}]/stats``."""
    return write_json({"model_stats": documents.describe_statistics(*_find(site, request))})


async def tell_all_statistics(site: Site, request: Request) -> Response:
    """``GET /v2/models/stats``."""
    found = [
        entry
        for service in site.services.values()
        for entry in documents.describe_statistics(service, service.pool.variants)
    ]
    return write_json({"model_stats": found})


async def tell_repository(site: Site, request: Request) -> Response:
    """``POST /v2/repository/index``."""
    return write_json(documents.list_repository(site.services))


async def tell_metrics(site: Site, request: Request) -> Response:
    """``GET /metrics``."""
    return Response(site.metrics.write(), headers={"Content-Type": metrics.CONTENT_TYPE})


async def tell_serving(site: Site, request: Request) -> Response:
    """``GET /stats``."""
    models = [documents.describe_serving(service) for service in site.services.values()]
    server = {"version": __version__, "since": site.since, "now": time.time()}
    return write_json({**server, "stopping": site.stopping, "models": models})


async def refuse_unsupported(site: Site, request: Request) -> Response:
    """What Triton does and this server doesn't."""
    raise Refusal(400, f"{request.url.path.split('/')[2]}: not supported by this server.")


def _find(site: Site, request: Request) -> tuple[Service, tuple[str, ...]]:
    """The model that an address names, and its version or all of them."""
    service = site.find(request.path_params["model"])
    version = request.path_params.get("version")
    if version is None:
        return service, service.pool.variants
    return service, (service.find(version).variant.name,)

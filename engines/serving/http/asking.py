"""Handlers that run a model: tensors in and out, or image files in and classes out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tocom_export.variant import Variant

from ...classifying import Answer as Ranked
from .bodies import hold_body
from .line import Answer
from .protocol import HEADER_LENGTH, InferRequest, format_answer, measure_text, parse_request
from .refusals import Refusal
from .service import Service
from .site import Site, ask
from .tracing import trace_request
from .writing import write_json

TIMEOUT = "X-Timeout-Ms"
"""Header of a request: milliseconds after which an answer is of no use."""
_TOP = 5
_AT_ONCE = 65_536
"""Bytes of JSON that are parsed where they are read."""


async def infer(site: Site, request: Request) -> Response:
    """``POST /v2/models/{m}[/versions/{v}]/infer``."""
    service, variant = find_asked(site, request)
    with trace_request(request.headers, service.name) as note:
        asked, answer = await _infer(site, request, service, variant)
        note(answer)
    body, length = format_answer(
        service.name, answer.variant.name, asked, answer.outputs, _describe(answer.variant)
    )
    if length is None:
        return Response(body, media_type="application/json")
    response = Response(body, media_type="application/octet-stream")
    # As the protocol spells it: headers that Starlette is given, it writes small.
    response.raw_headers.append((HEADER_LENGTH.encode(), str(length).encode()))
    return response


async def _infer(
    site: Site, request: Request, service: Service, variant: str | None
) -> tuple[InferRequest, Answer]:
    """What is asked, and its answer."""
    since = time.monotonic()
    deadline = read_deadline(request, since)
    most, headers = service.form.largest, request.headers
    async with hold_body(request.receive, headers, most, site.budget, site.executor) as body:
        header_length = headers.get(HEADER_LENGTH)
        parse = partial(parse_request, body, header_length, service.form)
        if measure_text(body, header_length) > _AT_ONCE:
            asked = await site.prepare(service, variant, deadline, parse)
        else:
            asked = parse()
        del parse, body
    deadline = min(deadline, since + (asked.seconds or math.inf))
    return asked, await ask(service, asked.images, variant, deadline, request.receive)


async def classify(site: Site, request: Request) -> Response:
    """``POST /v2/models/{m}[/versions/{v}]/classify``."""
    service, variant = find_asked(site, request)
    top = read_top(request)
    with trace_request(request.headers, service.name) as note:
        names, answer = await _classify(site, request, service, variant)
        note(answer)
    return write_json(describe_answer(service, answer, names, top))


async def _classify(
    site: Site, request: Request, service: Service, variant: str | None
) -> tuple[list[str], Answer]:
    """Names of the files, and the answer."""
    from .images import read_pictures

    since = time.monotonic()
    deadline = read_deadline(request, since)
    most, headers = site.largest_image, request.headers
    kind, bundle = headers.get("content-type", ""), service.pool.bundle
    async with hold_body(request.receive, headers, most, site.budget, site.executor) as body:
        read = partial(read_pictures, body, kind, service.most, bundle)
        names, images = await site.prepare(service, variant, deadline, read)
        del read, body
    return names, await ask(service, images, variant, deadline, request.receive)


def find_asked(site: Site, request: Request) -> tuple[Service, str | None]:
    """The model and the variant that an address names, before anything is read.

    Raises:
        Refusal: there is none, or no room for one more request.
    """
    site.check_open()
    service = site.find(request.path_params["model"])
    version = request.path_params.get("version")
    variant = None if version is None else service.find(version).variant.name
    site.check_room(service, variant)
    return service, variant


def read_deadline(request: Request, since: float) -> float:
    """The deadline of a request's header."""
    text = request.headers.get(TIMEOUT)
    if text is None:
        return math.inf
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise Refusal(400, f"{TIMEOUT} {text[:40]!r}: a number of milliseconds is expected.")
    return since + number / 1000


def read_top(request: Request) -> int:
    """How many classes a request asks for."""
    text = request.query_params.get("top_k", str(_TOP))
    if not (text.isascii() and text.isdigit() and int(text[:9]) > 0):
        raise Refusal(400, f"top_k {text[:40]!r}: a whole number of classes is expected.")
    return int(text[:9])


def describe_answer(
    service: Service, answer: Answer, names: Sequence[str], top: int
) -> dict[str, Any]:
    """What answered, and the likeliest classes of each image."""
    found = []
    for number, name in enumerate(names):
        ranked = Ranked(name, {output: rows[number] for output, rows in answer.outputs.items()})
        found.append({"file": name, **_describe_ranking(service, ranked, top)})
    return {
        "model_name": service.name,
        "model_version": answer.variant.name,
        "parameters": _describe(answer.variant),
        "images": found,
    }


def _describe(variant: Variant) -> dict[str, Any]:
    """What answered."""
    return {"variant": variant.name, "source": variant.source, "scale": variant.scale}


def _describe_ranking(service: Service, ranked: Ranked, top: int) -> dict[str, Any]:
    bundle = service.pool.bundle
    if not bundle.has_logits:
        return {"embedding": next(iter(ranked.outputs.values())).tolist()}
    names = bundle.classes
    return {
        "classes": [
            {"name": names[i] if names else f"class {i}", "index": i, "probability": share}
            for i, share in ranked.rank(top)
        ]
    }

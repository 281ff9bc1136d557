"""Handlers that run a model: tensors in and out, or image files in and classes out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tocom_export.errors import InputError
from tocom_export.variant import Variant

from ...classifying import Answer as Ranked
from ...engine import Images
from .bodies import hold_body
from .counts import Reason, name_reason
from .line import FULL, LATE, Answer
from .protocol import HEADER_LENGTH, InferRequest, format_answer, measure_text, parse_request
from .refusals import Gone, Refusal, refuse
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
    with find_asked(site, request) as aim, trace_request(request.headers, aim.service.name) as note:
        check_query(request)
        asked, answer = await _infer(site, request, aim)
        note(answer)
    name, variant = aim.service.name, answer.variant
    body, length = format_answer(name, variant.name, asked, answer.outputs, _describe(variant))
    if length is None:
        return Response(body, media_type="application/json")
    response = Response(body, media_type="application/octet-stream")
    # As the protocol spells it: headers that Starlette is given, it writes small.
    response.raw_headers.append((HEADER_LENGTH.encode(), str(length).encode()))
    return response


async def _infer(site: Site, request: Request, aim: Aim) -> tuple[InferRequest, Answer]:
    """What is asked, and its answer."""
    since, service = time.monotonic(), aim.service
    deadline = read_deadline(request, since)
    most, headers = service.form.largest, request.headers
    async with hold_body(
        request.receive, headers, most, site.budget, site.executor, "--max-batch"
    ) as body:
        header_length = headers.get(HEADER_LENGTH)
        parse = partial(parse_request, body, header_length, service.form)
        if measure_text(body, header_length) > _AT_ONCE:
            asked = await site.prepare(service, deadline, parse)
        else:
            asked = parse()
        del parse, body
    aim.choose(asked.variant)
    deadline = min(deadline, since + (asked.seconds or math.inf))
    return asked, await ask(service, asked.images, aim.variant, deadline, request.receive)


async def classify(site: Site, request: Request) -> Response:
    """``POST /v2/models/{m}[/versions/{v}]/classify``."""
    with find_asked(site, request) as aim, trace_request(request.headers, aim.service.name) as note:
        check_query(request, "top_k")
        top = read_top(request)
        names, answer = await _classify(site, request, aim)
        note(answer)
    return write_json(describe_answer(aim.service, answer, names, top))


async def _classify(site: Site, request: Request, aim: Aim) -> tuple[list[str], Answer]:
    """Names of the files, and the answer."""
    deadline = read_deadline(request, time.monotonic())
    names, images = await read_images(site, request, aim.service, deadline, aim.service.most)
    return names, await ask(aim.service, images, aim.variant, deadline, request.receive)


async def read_images(
    site: Site, request: Request, service: Service, deadline: float, most: int
) -> tuple[list[str], Images]:
    """The image files in a request: their names, and what they hold, as the model wants it."""
    from .images import read_pictures

    headers, largest = request.headers, site.largest_image
    kind, bundle = headers.get("content-type", ""), service.pool.bundle
    async with hold_body(
        request.receive, headers, largest, site.budget, site.executor, "--max-image-mb"
    ) as body:
        read = partial(read_pictures, body, kind, most, bundle)
        del body
        return await site.prepare(service, deadline, read)


@dataclass
class Aim:
    """The model and the variant that a request asks for."""

    service: Service
    variant: str | None
    """None is whichever is in force."""

    def choose(self, variant: str | int | None) -> None:
        """Take what the request's parameters say beside its address.

        Raises:
            Refusal: there is no such variant, or the address names another one.
        """
        if variant is None:
            return
        try:
            name = self.service.pool.open(variant).variant.name
        except InputError as error:
            raise refuse(error, self.service.paths) from None
        if self.variant not in (None, name):
            raise Refusal(
                400, f"the address asks for version {self.variant}, the parameters for {name}."
            )
        self.variant = name

    def note_failure(self, reason: Reason, *, late: bool = False) -> None:
        """The request got no result."""
        service = self.service
        service.counts.note_failure(self.variant or service.control.variant, reason, late=late)


@contextmanager
def find_asked(site: Site, request: Request) -> Iterator[Aim]:
    """The model and the variant that an address names, before anything is read.

    Within the block, and before it, what is raised counts as a failure of the model; once.

    Raises:
        Refusal: there is none, or no room for one more request.
    """
    service = site.find(request.path_params["model"])
    version = request.path_params.get("version")
    aim = Aim(service, None if version is None else service.find(version).variant.name)
    try:
        site.check_open()
        site.check_room(service)
        yield aim
    except Refusal as refusal:
        if not refusal.counted:
            aim.note_failure(name_reason(refusal), late=refusal.status == LATE)
        if refusal.status == FULL and not site.stopping:
            waiting = f"{service.name}: overloaded, {len(service.line)} images wait"
            service.overload.warn("%s; more requests are turned away", waiting)
        raise
    except Gone as gone:
        if not gone.counted:
            aim.note_failure("CANCELED")
        raise
    except Exception:
        aim.note_failure("OTHER")
        raise


def check_query(request: Request, *known: str) -> None:
    """Raise Refusal where there is something else behind the ``?`` of an address."""
    if unknown := [name for name in request.query_params if name not in known]:
        take = f"{' and '.join(known)} may stand there" if known else "nothing may stand there"
        raise Refusal(400, f"?{unknown[0][:40]} isn't known; {take}.")


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
        given = ranked.outputs
        name = next((name for name in ("embedding", "logits") if name in given), "tokens")
        # Bundles of models without a head once called their embedding logits.
        return {"embedding" if name == "logits" else name: given[name].tolist()}
    names = bundle.classes
    return {
        "classes": [
            {"name": names[i] if names else f"class {i}", "index": i, "probability": share}
            for i, share in ranked.rank(top)
        ]
    }

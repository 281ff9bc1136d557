"""The handler that shows what a variant makes of a picture: its classes, and its tokens."""

from __future__ import annotations

import base64
import io
import math
import time
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tocom_export.errors import TocomError

from ...engine import Images
from ...merge_picture import restore_pixels
from ..pool import EnginePool
from .asking import check_query, describe_answer, find_asked, read_deadline, read_images, read_top
from .refusals import refuse
from .site import Site, ask
from .writing import write_json


async def show_patches(site: Site, request: Request) -> Response:
    """``POST /v2/models/{m}/versions/{v}/patches``: an image file → classes and a map of tokens.

    The model answers as it does others; the map is made beside it. ``seen=1`` adds the picture as
    the model sees it.
    """
    with find_asked(site, request) as aim:
        check_query(request, "top_k", "seen")
        top, seen = read_top(request), request.query_params.get("seen") == "1"
        deadline = read_deadline(request, time.monotonic())
        service, pool = aim.service, aim.service.pool
        _, images = await read_images(site, request, service, deadline, 1)
        asked = time.monotonic()
        answer = await ask(service, images, aim.variant, deadline, request.receive)
        took = time.monotonic() - asked
    found: dict[str, Any] = {
        **describe_answer(service, answer, [""], top),
        "answered_ms": 1000 * took,
    }
    found |= found.pop("images")[0]
    run = partial(site.prepare, service, math.inf)  # it has its answer, late or not
    found |= await run(partial(_trace, pool, answer.variant.name, images, service.paths))
    if seen:
        found["seen"] = await run(partial(_encode, images, pool.bundle.preprocess))
    return write_json(found)


def _trace(pool: EnginePool, variant: str, images: Images, paths: Any) -> dict[str, Any]:
    """Which token of those that are left each patch is part of; or why that isn't known."""
    try:
        map = pool.trace(images, variant).maps[0, -1]  # (patches,)
    except TocomError as error:
        return {"no_map": f"No picture of its patches: {refuse(error, paths).text}"}
    tokens = len({token for token in map.tolist() if token >= 0})
    spec = pool.spec
    others = spec.tokens - spec.patches
    return {"grid": list(spec.grid), "map": map.tolist(), "tokens": tokens, "others": others}


def _encode(images: Images, preprocess: Any) -> str:
    """An image (1, C, H, W) as it was seen, as the address of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(restore_pixels(images[0], preprocess)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

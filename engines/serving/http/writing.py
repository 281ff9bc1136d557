"""Answers in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from .refusals import Refusal


def write_json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(msgspec.json.encode(data), status, headers, "application/json")


def write_refusal(refusal: Refusal) -> Response:
    """An error as the protocol has it."""
    return write_json({"error": refusal.text}, refusal.status, refusal.headers)

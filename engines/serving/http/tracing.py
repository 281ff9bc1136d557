"""Spans of requests, where OpenTelemetry is installed; its SDK says where they go, if anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

from .line import Answer


@contextmanager
def trace_request(headers: Mapping[str, str], model: str) -> Iterator[Callable[[Answer], None]]:
    """A span of one request, in the trace that its ``traceparent`` names (W3C).

    Yields:
        What is called with the answer, for its variant, and for spans of its wait and its run.
    """
    if not _is_installed():
        yield lambda answer: None
        return
    from opentelemetry import propagate, trace

    tracer = trace.get_tracer("tocom-export")
    with tracer.start_as_current_span(
        f"infer {model}",
        context=propagate.extract(headers),
        kind=trace.SpanKind.SERVER,
        attributes={"tocom.model": model},
    ) as span:

        def note(answer: Answer) -> None:
            span.set_attribute("tocom.variant", answer.variant.name)
            span.set_attribute("tocom.images", len(next(iter(answer.outputs.values()))))
            parts = {"queue": (answer.arrived, answer.start), "run": (answer.start, answer.end)}
            for name, (begin, end) in parts.items():
                tracer.start_span(name, start_time=_to_epoch(begin)).end(_to_epoch(end))

        yield note


@cache
def _is_installed() -> bool:
    return find_spec("opentelemetry") is not None and find_spec("opentelemetry.trace") is not None


def _to_epoch(moment: float) -> int:
    """Nanoseconds since 1970 of a time of ``time.monotonic``."""
    return time.time_ns() - round(1e9 * (time.monotonic() - moment))

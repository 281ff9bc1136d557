"""Spans, read by OpenTelemetry's own SDK."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk")
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tocom_export.engines.serving.http import tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where the spans of a test go."""
    found, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(found))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return found


def read(exporter: InMemorySpanExporter, count: int) -> dict:
    until = time.monotonic() + 20
    while len(spans := exporter.get_finished_spans()) < count:
        assert time.monotonic() < until
        time.sleep(0.005)
    return {span.name: span for span in spans}


def test_a_request_is_a_span_of_its_trace(running, images, exporter):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    assert running.infer(images, "r08", headers=headers).status == 200
    found = read(exporter, 3)
    whole, queue, run = found["infer small"], found["queue"], found["run"]
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert queue.parent.span_id == run.parent.span_id == whole.context.span_id
    assert dict(whole.attributes) == {
        "tocom.model": "small", "tocom.variant": "r08", "tocom.images": 3,
    }  # fmt: skip
    assert queue.start_time <= queue.end_time <= run.end_time + 10**6
    assert run.start_time < run.end_time


def test_so_is_one_that_is_refused(running, images, exporter):
    assert running.infer(images[:, :2]).status == 400
    (whole,) = read(exporter, 1).values()
    assert not whole.status.is_ok


def test_without_it_nothing_is_done(running, images, exporter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracing, "_is_installed", lambda: False)
    assert running.infer(images).status == 200
    assert exporter.get_finished_spans() == ()

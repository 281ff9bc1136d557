"""``GET /metrics``: counts in Prometheus' text format, under Triton's names where it has one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .counts import Sums
from .service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TRITON: Mapping[str, tuple[str, Callable[[Sums], float]]] = {
    "nv_inference_request_success": ("Requests answered", lambda sums: sums.success),
    "nv_inference_count": ("Images run", lambda sums: sums.images),
    "nv_inference_exec_count": ("Runs, each of a batch", lambda sums: sums.runs),
    "nv_inference_request_duration_us": ("From arrival to answer", lambda s: 1e6 * s.request),
    "nv_inference_queue_duration_us": ("Waiting for a run", lambda s: 1e6 * s.queue),
    "nv_inference_compute_infer_duration_us": ("In a run", lambda s: 1e6 * s.compute),
}
_SUFFIX = re.compile(rb"^((?:# (?:HELP|TYPE) )?nv_\w+?)_total\b", re.M)


class Metrics:
    """What a scrape reads, of all models; keeps nothing itself."""

    def __init__(self, services: Mapping[str, Service]) -> None:
        self._services = services
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def write(self) -> bytes:
        """The text, in the format of :data:`CONTENT_TYPE`."""
        # Triton's counters lack the suffix that the library gives to every counter.
        return _SUFFIX.sub(rb"\1", generate_latest(self._registry))

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        records = {name: service.counts.read() for name, service in self._services.items()}
        for name, (help_text, value) in _TRITON.items():
            family = CounterMetricFamily(name, help_text, labels=("model", "version"))
            for model, record in records.items():
                for version, sums in record.sums.items():
                    family.add_metric((model, version), value(sums))
            yield family
        failed = CounterMetricFamily(
            "nv_inference_request_failure",
            "Requests refused or failed, by why",
            labels=("model", "version", "reason"),
        )
        for model, record in records.items():
            for version, sums in record.sums.items():
                for reason, count in sums.failures.items():
                    failed.add_metric((model, version, reason), count)
        yield failed
        counters = {
            "tocom_switches": ("Changes of the variant in force", "switches"),
            "tocom_refits": ("Exchanges of the weights", "refits"),
            "tocom_slo_misses": ("Requests that took longer than wanted", "misses"),
        }
        for name, (help_text, field) in counters.items():
            family = CounterMetricFamily(name, help_text, labels=("model",))
            for model, record in records.items():
                family.add_metric((model,), getattr(record, field))
            yield family
        yield from self._collect_gauges()

    def _collect_gauges(self) -> Iterator[Metric]:
        force = GaugeMetricFamily(
            "tocom_variant_in_force", "1 for the variant in force", labels=("model", "version")
        )
        queued = GaugeMetricFamily("tocom_queue_length", "Images that wait", labels=("model",))
        served = GaugeMetricFamily(
            "tocom_accuracy_served",
            "Mean recorded accuracy, percent, of the variants that answered the last requests",
            labels=("model",),
        )
        wanted = GaugeMetricFamily("tocom_slo_seconds", "Latency wanted", labels=("model",))
        for model, service in self._services.items():
            variant = service.control.variant
            for version in service.pool.variants:
                force.add_metric((model, version), version == variant)
            queued.add_metric((model,), len(service.line))
            accuracy = service.counts.read().mean_accuracy(service.pool.bundle.accuracy)
            if accuracy is not None:
                served.add_metric((model,), accuracy)
            if service.slo is not None:
                wanted.add_metric((model,), service.slo)
        yield from (force, queued, served, wanted)

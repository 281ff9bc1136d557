"""What is told about models: metadata, configuration and statistics, as the protocol has them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from tocom_export._version import __version__
from tocom_export.bundle.opening import Bundle

from ..triton import describe_preprocess
from .counts import Record, Sums
from .history import STEP, Step, average_accuracy
from .protocol import GIVEN, INPUT
from .service import Service

SERVER = "tocom-export"
EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
)
"""Of the protocol, Triton's names; of the repository the index alone, of the policy the timeout."""
_PLATFORMS = {
    "onnx": "onnxruntime_onnx",
    "openvino": "openvino",
    "tensorrt": "tensorrt_plan",
    "tensorrt-rtx": "tensorrt_plan",
}
_NS = 1_000_000_000


def describe_server() -> dict[str, Any]:
    """``GET /v2``."""
    return {"name": SERVER, "version": __version__, "extensions": list(EXTENSIONS)}


def describe_model(service: Service, versions: Iterable[str]) -> dict[str, Any]:
    """``GET /v2/models/{m}``."""
    shape = [-1, *service.form.image]
    forms = service.pool.bundle.forms.items()
    return {
        "name": service.name,
        "versions": list(versions),
        "platform": _PLATFORMS[service.pool.backend],
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": shape}],
        "outputs": [
            {"name": name, "datatype": GIVEN[form.dtype], "shape": [-1, *form.shape]}
            for name, form in forms
        ],
    }


def describe_config(service: Service) -> dict[str, Any]:
    """``GET /v2/models/{m}/config``: of Triton's ``ModelConfig`` what has a meaning here."""
    options, forms = service.options, service.pool.bundle.forms.items()
    images = {"name": INPUT, "data_type": "TYPE_FP32", "dims": list(service.form.image)}
    parameters = describe_preprocess(service.pool.bundle)
    return {
        "name": service.name,
        "platform": _PLATFORMS[service.pool.backend],
        "backend": SERVER,
        "max_batch_size": service.most,
        "input": [images],
        "output": [
            {"name": name, "data_type": f"TYPE_{GIVEN[form.dtype]}", "dims": list(form.shape)}
            for name, form in forms
        ],
        "dynamic_batching": {
            "preferred_batch_size": [service.most],
            "max_queue_delay_microseconds": round(1e6 * options.max_delay),
            "default_queue_policy": {"max_queue_size": options.queue},
        },
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


def describe_statistics(service: Service, versions: Iterable[str]) -> list[dict[str, Any]]:
    """Of ``GET …/stats``, the entries of one model: one for each version."""
    sums = service.counts.read().sums
    return [_describe_sums(service.name, version, sums[version]) for version in versions]


def _describe_sums(model: str, version: str, sums: Sums) -> dict[str, Any]:
    nothing = {"count": 0, "ns": 0}

    def add(seconds: float, count: int = sums.success) -> dict[str, int]:
        return {"count": count, "ns": round(_NS * seconds)}

    return {
        "name": model,
        "version": version,
        "last_inference": round(1000 * sums.last),
        "inference_count": sums.images,
        "execution_count": sums.runs,
        "inference_stats": {
            "success": add(sums.request),
            "fail": {"count": sums.failure, "ns": 0},
            "queue": add(sums.queue),
            "compute_input": nothing,
            "compute_infer": add(sums.compute),
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": {**nothing, "count": runs},
                "compute_infer": add(seconds, runs),
                "compute_output": {**nothing, "count": runs},
            }
            for size, (runs, seconds) in sorted(sums.batches.items())
        ],
    }


def list_repository(services: Mapping[str, Service]) -> list[dict[str, Any]]:
    """``POST /v2/repository/index``."""
    return [
        {
            "name": service.name,
            "version": version,
            "state": "READY" if service.alive else "UNAVAILABLE",
            "reason": "" if service.alive else "its thread has ended",
        }
        for service in services.values()
        for version in service.pool.variants
    ]


def describe_serving(service: Service) -> dict[str, Any]:
    """Of ``GET /stats``, one model: what is served, since when, how fast and how well."""
    record, bundle = service.counts.read(), service.pool.bundle
    return {
        "name": service.name,
        "model": bundle.spec.model,
        "backend": service.pool.backend,
        "precision": bundle.precision,
        "policy": describe_policy(service),
        "variant": service.control.variant,
        "variants": [_describe_variant(service, record, name) for name in service.pool.variants],
        "changes": [{"at": at, "variant": name} for at, name in record.changes],
        "switches": record.switches,
        "refits": record.refits,
        "slo_misses": record.misses,
        "turned_away": record.failures["REJECTED"],
        "failures": record.failures,
        "queue": {"images": len(service.line), "most": service.line.most},
        "max_batch": service.most,
        **_describe_record(record, bundle),
        "lately": _describe_record(record.lately(), bundle),
        "history": [_describe_step(step, bundle) for step in record.history],
    }


def _describe_step(step: Step, bundle: Bundle) -> dict[str, Any]:
    """How fast and how well requests were answered within some seconds."""
    median, most = step.latencies_ms or (None, None)
    return {
        "at": time.time() - time.monotonic() + step.end,
        "p50": median,
        "p99": most,
        "images_per_s": step.images / STEP,
        "accuracy_served": average_accuracy(step.answered, bundle.accuracy),
    }


def _describe_record(record: Record, bundle: Bundle) -> dict[str, Any]:
    """How fast and how well some requests were answered."""
    found = record.latencies_ms
    return {
        "latency_ms": None if found is None else dict(zip(("p50", "p99"), found, strict=True)),
        "images_per_s": record.throughput(),
        "accuracy_served": record.mean_accuracy(bundle.accuracy),
    }


def describe_policy(service: Service) -> dict[str, Any]:
    """What chooses the variant."""
    options = service.options
    return {
        "name": (options.policy or "steering") if options.steered else "fixed",
        "slo_ms": None if service.slo is None else 1000 * service.slo,
        "pinned": service.control.pinned,
    }


def _describe_variant(service: Service, record: Record, name: str) -> dict[str, Any]:
    bundle = service.pool.bundle
    variant, sums = bundle.variants[name], record.sums[name]
    expected = service.seconds.get(name, {})
    shown = asdict(variant)
    return {
        **{key: shown[key] for key in ("name", "degrees", "source", "scale", "compensated")},
        "macs": variant.schedule(bundle.spec).macs(bundle.spec),
        "accuracy": bundle.accuracy.get(name),
        "expected_ms": {str(batch): 1000 * seconds for batch, seconds in expected.items()},
        "requests": sums.success,
        "failures": sums.failure,
        "images": sums.images,
    }

"""Throughput and memory of DeiT-S engines in ONNX Runtime on the CPU."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
from common import Row, build_bundle

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.verify import sample_images

MODEL, TARGETS, BATCH, ROUNDS = "deit_small_patch16_224", (0, 4, 8, 12, 16), 8, 15
DENSE, FASTEST = "r00", "r16"

PSS = """
import sys
from pathlib import Path
from tocom_export.bundle.opening import Bundle
from tocom_export.engines.verify import sample_images
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.io.memory import read_memory
bundle = Bundle.open(Path(sys.argv[1]))
images = sample_images(bundle.spec, 8)
engines = [OnnxEngine(bundle, name) for name in sys.argv[2].split(",")]
for engine in engines:
    engine.run(images)
print(read_memory())
"""


def measure_memory(bundle: Path, *variants: str) -> int:
    """Bytes (proportional set size) of a process that has run engines of those variants."""
    line = [sys.executable, "-c", PSS, bundle, ",".join(variants)]
    return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def time_batches(bundle: Bundle) -> dict[str, float]:
    """Median seconds a batch: each engine, and the same with ONNX Runtime's own prepacking.

    Rounds are interleaved, so that a machine that drifts is fair to all.
    """
    images = sample_images(bundle.spec, BATCH)
    runs = {name: OnnxEngine(bundle, name).run for name in (DENSE, FASTEST)}
    for name in (DENSE, FASTEST):
        options = onnxruntime.SessionOptions()  # as an engine's, but for the prepacking
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            str(bundle.graph(name)), options, providers=["CPUExecutionProvider"]
        )
        runs[f"{name} prepacked"] = lambda x, s=session: s.run(None, {"images": x})[0]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(images)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        low, high = np.percentile(values, [10, 90])
        print(f"{name}: median {median(values):.3f} s, 10 to 90 %: {low:.3f} to {high:.3f}")
    return {name: median(values) for name, values in times.items()}


def measure() -> list[Row]:
    """All of it, in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = build_bundle(MODEL, folder, TARGETS)
        bundle = Bundle.open(out)
        took = time_batches(bundle)
        five, one = measure_memory(out, *bundle.variants), measure_memory(out, DENSE)
    slower = max(took[name] / took[f"{name} prepacked"] for name in (DENSE, FASTEST))
    return [
        (
            "throughput at r = 16 over r = 0, DeiT-S, batch 8, ONNX Runtime on CPU",
            f"{BATCH / took[FASTEST]:.1f} over {BATCH / took[DENSE]:.1f} images/s: "
            f"{took[DENSE] / took[FASTEST]:.2f}×",
            "≥ 1.85 (MACs alone: 2.01)",
        ),
        (
            "memory (PSS) of five DeiT-S engines that have run, over one",
            f"{five / 1e6:.0f} MB over {one / 1e6:.0f} MB: {five / one:.2f}×",
            "≤ 1.8×",
        ),
        (
            "time without prepacking over time with it, the worse of r = 0 and r = 16",
            f"{slower:.3f}×",
            "≤ 1.05×",
        ),
    ]

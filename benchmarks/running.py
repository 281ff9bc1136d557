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
from common import Row, built

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.verify import sample_images

MODEL, TARGETS, BATCH, ROUNDS = "deit_small_patch16_224", (0, 4, 8, 12, 16), 8, 15

PSS = """
import sys, re
from pathlib import Path
from tocom_export.bundle.opening import Bundle
from tocom_export.engines.verify import sample_images
from tocom_export.engines.onnx.engine import OnnxEngine
bundle = Bundle.open(Path(sys.argv[1]))
images = sample_images(bundle.spec, 8)
engines = [OnnxEngine(bundle, int(t)) for t in sys.argv[2].split(",")]
for engine in engines:
    engine.run(images)
rollup = Path("/proc/self/smaps_rollup").read_text()
print(re.search(r"^Pss:\\s+(\\d+)", rollup, re.M)[1])
"""


def pss(bundle: Path, targets: str) -> int:
    """Proportional set size, kB, of a process that has run engines at those degrees."""
    done = subprocess.run(
        [sys.executable, "-c", PSS, bundle, targets], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def seconds(bundle: Bundle) -> dict[str, float]:
    """Median seconds a batch: each engine, and the same with ONNX Runtime's own prepacking.

    Rounds are interleaved, so that a machine that drifts is fair to all.
    """
    images = sample_images(bundle.spec, BATCH)
    runs = {f"r{t}": OnnxEngine(bundle, t).run for t in (0, 16)}
    for target in (0, 16):
        options = onnxruntime.SessionOptions()  # as an engine's, but for the prepacking
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            str(bundle.graph(target)), options, providers=["CPUExecutionProvider"]
        )
        runs[f"r{target} prepacked"] = lambda x, s=session: s.run(None, {"images": x})[0]
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
        out = built(MODEL, folder, TARGETS)
        took = seconds(Bundle.open(out))
        five, one = pss(out, ",".join(map(str, TARGETS))), pss(out, "0")
    slower = max(took[r] / took[f"{r} prepacked"] for r in ("r0", "r16"))
    return [
        (
            "throughput at r = 16 over r = 0, DeiT-S, batch 8, ONNX Runtime on CPU",
            f"{BATCH / took['r16']:.1f} over {BATCH / took['r0']:.1f} images/s: "
            f"{took['r0'] / took['r16']:.2f}×",
            "≥ 1.85 (multiply-adds alone: 2.01)",
        ),
        (
            "memory (PSS) of five DeiT-S engines that have run, over one",
            f"{five / 1024:.0f} MB over {one / 1024:.0f} MB: {five / one:.2f}×",
            "≤ 1.8×",
        ),
        (
            "time without prepacking over time with it, the worse of r = 0 and r = 16",
            f"{slower:.3f}×",
            "≤ 1.05×",
        ),
    ]

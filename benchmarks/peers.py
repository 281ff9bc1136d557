"""DeiT-S engines beside what one would use instead: ``tocom-export bench --peers``, once."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Row, built

MODEL, TARGETS, BATCH = "deit_small_patch16_224", (0, 4, 8, 12, 16), 8


def measure() -> list[Row]:
    """Build the bundle, run the command, and read its document."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = built(MODEL, folder, TARGETS)
        line = ["tocom-export", "bench", str(out), "--peers", "--batch", str(BATCH), "--json"]
        done = subprocess.run(
            [*line, "--seconds", "20"], check=True, stdout=subprocess.PIPE, text=True
        )
    found = json.loads(done.stdout)
    print(done.stdout, file=sys.stderr)
    ours = {timing["target"]: timing["throughput"] for timing in found["timings"]}
    theirs = {peer["name"]: peer["throughput"] for peer in found["peers"]}
    eager = theirs["torch eager, dense"]
    optimum = next((rate for name, rate in theirs.items() if name.startswith("Optimum")), None)
    other = "it is not installed"
    if optimum:
        other = f"{ours[0]:.1f} over {optimum:.1f} images/s: {ours[0] / optimum:.3f}×"
    return [
        (
            f"r = 16 over r = 0, DeiT-S, batch {BATCH}, `bench --peers`",
            f"{ours[16]:.1f} over {ours[0]:.1f} images/s: {ours[16] / ours[0]:.2f}×",
            "≥ 1.85",
        ),
        (
            "our r = 16 over the dense model in torch eager",
            f"{ours[16]:.1f} over {eager:.1f} images/s: {ours[16] / eager:.2f}×",
            "≥ 2.2×",
        ),
        ("our r = 0 over Optimum's export in ONNX Runtime", other, "no slower"),
    ]

"""DeiT-S engines beside what one would use instead: ``tocom-export bench --peers``, once."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Row, build_bundle

MODEL, TARGETS, BATCH = "deit_small_patch16_224", (0, 4, 8, 12, 16), 8


def measure() -> list[Row]:
    """Build the bundle, run the command, and read its document."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = build_bundle(MODEL, folder, TARGETS)
        line = ["tocom-export", "bench", str(out), "--peers", "--batch", str(BATCH), "--json"]
        done = subprocess.run(
            [*line, "--seconds", "20"], check=True, stdout=subprocess.PIPE, text=True
        )
    found = json.loads(done.stdout)
    print(done.stdout, file=sys.stderr)
    pace = {row["name"]: row["images_per_s"] for row in found["rows"]}
    dense, fastest, eager = pace["r00"], pace["r16"], pace["torch eager, dense, fp32"]
    optimum = next((rate for name, rate in pace.items() if name.startswith("Optimum")), None)
    other = "it is not installed"
    if optimum:
        other = f"{dense:.1f} over {optimum:.1f} images/s: {dense / optimum:.3f}×"
    return [
        (
            f"r = 16 over r = 0, DeiT-S, batch {BATCH}, `bench --peers`",
            f"{fastest:.1f} over {dense:.1f} images/s: {fastest / dense:.2f}×",
            "≥ 1.85",
        ),
        (
            "our r = 16 over the dense model in torch eager",
            f"{fastest:.1f} over {eager:.1f} images/s: {fastest / eager:.2f}×",
            "≥ 2.2×",
        ),
        ("our r = 0 over Optimum's export in ONNX Runtime", other, "no slower"),
    ]

"""DeiT-S on a processor: our engines beside the strongest that one could run instead, in turns.

python benchmarks/cpu.py [SECONDS] [PATTERN]

SECONDS: for each engine at each batch, ten runs at least; default 3. PATTERN: a regular expression,
of the names that are timed; default: all. Prints Markdown tables.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import describe_machine, make_bank, make_checkpoint
from PIL import Image

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.bench.timing import Timing, time_engines
from tocom_export.engines.openvino.library import open_core
from tocom_export.engines.verify import sample_images
from tocom_export.exporting import export
from tocom_export.training.peers.opening import open_peers

MODEL = "deit_small_patch16_224"
SCHEDULES = {f"every{step}": f"every:{step}" for step in (2, 3, 4, 5)}
BATCHES = (1, 8)
TARGETS = (0, 4, 8, 12, 16)
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "ONNX Runtime, fp32": ("fp32", {"backend": "onnx"}),
    "ONNX Runtime, int8": ("int8", {"backend": "onnx"}),
    "ONNX Runtime, int8, ranges at each run": ("dynamic", {"backend": "onnx"}),
    "OpenVINO, fp32": ("fp32", {"backend": "openvino", "inference_precision": "f32"}),
    "OpenVINO, bf16": ("fp32", {"backend": "openvino", "inference_precision": "bf16"}),
    "OpenVINO, int8+bf16": ("int8", {"backend": "openvino", "inference_precision": "bf16"}),
}
"""What it is called → the bundle, and how it is run."""


OPEN = """
import json, sys, time
import openvino
from tocom_export import Bundle
from tocom_export.engines.openvino.engine import OpenVinoEngine
from tocom_export.engines.verify import sample_images
from tocom_export.io.memory import read_memory
path, options, *names = sys.argv[1:]
bundle = Bundle.open(path)
began = time.perf_counter()
engines = [bundle.engine(name, batch=[1], **json.loads(options)) for name in names]
opened = time.perf_counter() - began
for engine in engines:
    engine.run(sample_images(bundle.spec, 1))
print(json.dumps([read_memory(), opened]))
"""
"""A process that opens variants, runs each, and prints memory and seconds of opening."""


def build_bundles(folder: Path) -> dict[str, Bundle]:
    """The same variants in float32 and in int8, with ranges measured and without."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, image in enumerate(draw_pictures(64)):
        image.save(pictures / f"{number}.png")
    common: dict[str, Any] = {
        "checkpoint": make_checkpoint(MODEL, folder), "bank": make_bank(MODEL, folder),
        "targets": TARGETS, "schedules": SCHEDULES, "verify": False,
    }  # fmt: skip
    return {
        "fp32": export(MODEL, folder / "fp32", **common),
        "int8": export(MODEL, folder / "int8", precision="int8", calibrate=pictures, **common),
        "dynamic": export(MODEL, folder / "dynamic", precision="int8", calibrate="none", **common),
    }


def draw_pictures(count: int) -> Iterator[Image.Image]:
    """Smooth blobs of colour, to measure ranges on."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = np.clip(60 * rng.standard_normal((7, 7, 3)) + 128, 0, 255).astype(np.uint8)
        yield Image.fromarray(coarse).resize((224, 224), Image.Resampling.BICUBIC)


def time_all(
    bundles: dict[str, Bundle], folder: Path, seconds: float, pattern: str
) -> dict[Any, Timing]:
    """(name, variant, batch) → its time, engines and peers in turns."""
    runs: dict[tuple[str, str], Any] = {}
    for way, (kind, options) in WAYS.items():
        for name in ("r00", "r16", *SCHEDULES) if re.search(pattern, way) else ():
            runs[way, name] = bundles[kind].engine(name, batch=BATCHES, **options).run
    calibration = sample_images(bundles["fp32"].spec, 32)
    tell = partial(print, file=sys.stderr)
    for peer in open_peers(
        bundles["fp32"], "cpu", None, folder, tell, images=calibration, batches=BATCHES
    ):
        if isinstance(peer, str):
            print(peer, file=sys.stderr)
        elif re.search(pattern, peer.name):
            runs[peer.name, peer.variant] = peer.run
    found = {}
    for batch in BATCHES:
        images = sample_images(bundles["fp32"].spec, batch)
        calls = {key: partial(run, images) for key, run in runs.items()}
        for key, timing in time_engines(calls, batch, seconds).items():
            found[(*key, batch)] = timing
    return found


def print_times(found: dict[Any, Timing], bundles: dict[str, Bundle]) -> None:
    """All of them, medians and minima."""
    bundle = bundles["fp32"]
    print("| | variant | MACs | batch 1, ms: median (min) | batch 8 |\n|---|---|---:|---:|---:|")
    for way, name in dict.fromkeys((way, name) for way, name, _ in found):
        macs = bundle.variants[name].schedule(bundle.spec).macs(bundle.spec)
        cells = [found[way, name, batch] for batch in BATCHES]
        times = " | ".join(f"{cell.median_ms:.1f} ({cell.min_ms:.1f})" for cell in cells)
        print(f"| {way} | {name} | {macs / 1e6:,.0f} M | {times} |")


def share_of_merging(graph: Path, batch: int | None) -> float:
    """Percent of the time of OpenVINO's nodes that is matching and merging, median of 20 runs."""
    core = open_core()
    model = core.read_model(str(graph))
    images = np.asarray(np.random.default_rng(0).standard_normal((8, 3, 224, 224)), np.float32)
    if batch is not None:
        model.reshape([batch, 3, 224, 224])
    compiled = core.compile_model(model, "CPU", {"PERF_COUNT": True, "PERFORMANCE_HINT": "LATENCY"})
    request, shares = compiled.create_infer_request(), []
    for _ in range(20):
        request.infer({0: images})
        times = {n.node_name: n.real_time.total_seconds() for n in request.get_profiling_info()}
        merging = sum(taken for name, taken in times.items() if ".tome/" in name)
        shares.append(100 * merging / sum(times.values()))
    return float(np.median(shares))


def measure_openings(bundle: Bundle, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    """[memory, seconds] of a second start of one variant, and of five."""
    found = []
    for names in (["r16"], [f"r{degree:02d}" for degree in TARGETS]):
        line = [sys.executable, "-c", OPEN, str(bundle.path), json.dumps(options), *names]
        for _ in range(2):  # the first may compile
            done = subprocess.run(line, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    return found[0], found[1]


def main(seconds: float, pattern: str) -> None:
    """Build, time, and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = build_bundles(folder)
        print(f"\n{datetime.date.today()}, {describe_machine()}\n", flush=True)
        for way in ("OpenVINO, fp32", "OpenVINO, bf16", "OpenVINO, int8+bf16"):
            kind, options = WAYS[way]
            one, five = measure_openings(bundles[kind], options)
            print(f"{way}: second start {one[1]:.2f} s; memory of one {one[0] / 1e6:.0f} MB, of "
                  f"five {five[0] / 1e6:.0f} MB: {five[0] / one[0]:.2f}×", flush=True)  # fmt: skip
        for batch in (8, None):
            for kind in ("fp32", "int8"):
                share = share_of_merging(bundles[kind].graph("r16"), batch)
                print(f"merging's share, {kind}, compiled for {batch or 'any'}: {share:.1f} %")
        print_times(time_all(bundles, folder, seconds, pattern), bundles)


if __name__ == "__main__":
    _, *given = sys.argv
    main(float(given[0]) if given else 3.0, given[1] if len(given) > 1 else "")

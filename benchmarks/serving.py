"""An EnginePool while it serves: switching, refitting, memory, overhead, and steering by load."""

from __future__ import annotations

import queue
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from building import torch_export
from common import Row, bank, built

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.serving.simulation import Arrivals, outcome, synthetic
from tocom_export.engines.serving.steering import Load, Steering
from tocom_export.engines.verify import sample_images

SMALL, BASE = "deit_small_patch16_224", "deit_base_patch16_224"
TARGETS = (0, 4, 8, 12, 16)
SLO_RATIOS = (6, 10)
"""The latency wanted, over that of one request to the dense model."""
TRACE_SECONDS = 60

PSS = """
import sys
from tocom_export import EnginePool
from tocom_export.engines.verify import sample_images
from tocom_export.io.memory import own_memory
pool = EnginePool(sys.argv[1], targets=map(int, sys.argv[2].split(",")))
images = sample_images(pool.spec, 8)
for target in pool.targets:
    pool.switch(target)
    pool.run(images)
print(own_memory())
"""


def switching(bundle: Path) -> Row:
    """Time of a switch while eight threads ask, and whether each answer is its degree's."""
    images = sample_images(Bundle.open(bundle).spec, 1)
    took: list[float] = []
    answered, wrong = 0, 0
    with EnginePool(bundle, threads=1) as pool:
        wanted = {t: pool.switch(t).run(images) for t in TARGETS}
        until = time.monotonic() + 30
        counts: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

        def ask() -> None:
            right, others = 0, 0
            while time.monotonic() < until:
                serving = pool.serving
                same = np.array_equal(serving.run(images), wanted[serving.target])
                right, others = right + same, others + (not same)
            counts.put((right, others))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        rng = np.random.default_rng(0)
        while time.monotonic() < until:
            target = int(rng.choice(TARGETS))
            start = time.perf_counter()
            pool.switch(target)
            took.append(time.perf_counter() - start)
            time.sleep(0.01)
        for thread in threads:
            thread.join()
            right, others = counts.get(timeout=1)
            answered, wrong = answered + right, wrong + others
    middle, most, worst = (1000 * float(np.quantile(took, q)) for q in (0.5, 0.99, 1))
    return (
        "`switch` between open engines of DeiT-S while eight threads ask, 30 s",
        f"median {1000 * middle:.0f} µs, 99 % within {most:.2f} ms, longest {worst:.2f} ms of "
        f"{len(took)}; {answered} answers, {wrong} of another degree than the one that served",
        "≤ 1 ms, none lost or mixed",
    )


def refitting(folder: Path) -> Row:
    """One degree of DeiT-B refitted, against exporting it again with torch."""
    steps = ToComBank.load(bank(BASE, folder))
    took = []
    with EnginePool(built(BASE, folder, TARGETS), targets=[16], threads=2) as pool:
        for source in (4, 0, 8, 0, 12):
            start = time.perf_counter()
            pool.refit(bank=steps, source=source)
            took.append(time.perf_counter() - start)
    theirs = torch_export(16, folder / "torch.onnx")
    ours = median(took)
    return (
        "`refit` of one degree of DeiT-B in a pool (bake, open, run once, swap), median of five, "
        "over torch.onnx.export(dynamo=True) of the same degree",
        f"{ours:.2f} s against {theirs:.1f} s: {theirs / ours:.0f}×",
        "≤ 1 s, ≥ 50×",
    )


def memory(bundle: Path) -> Row:
    """A process with five degrees open over one with r = 0."""

    def pss(targets: str) -> int:
        line = [sys.executable, "-c", PSS, bundle, targets]
        return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)

    five, one = pss(",".join(map(str, TARGETS))), pss("0")
    return (
        "memory (PSS) of a pool with five degrees of DeiT-S open that have run, over one",
        f"{five / 1e6:.0f} MB over {one / 1e6:.0f} MB: {five / one:.2f}×",
        "≤ 1.8×",
    )


def overhead(bundle: Path) -> Row:
    """A run through the pool over one of its own bare session, in turns."""
    images = sample_images(Bundle.open(bundle).spec, 1)
    with EnginePool(bundle, targets=[16]) as pool:
        engine = pool.serving.engine
        assert isinstance(engine, OnnxEngine)
        session = engine._opened[0]
        ratios = []
        for turn in range(200):
            took = {}
            calls = [("pool", partial(pool.run, images)),
                     ("bare", partial(session.run, None, {"images": images}))]  # fmt: skip
            for name, call in calls if turn % 2 else reversed(calls):
                start = time.perf_counter()
                call()
                took[name] = time.perf_counter() - start
            ratios.append(took["pool"] / took["bare"])
    return (
        "a run of DeiT-S at r = 16, batch 1, through the pool over the bare ONNX Runtime session",
        f"{100 * (median(ratios) - 1):+.1f} % (median of 200 pairs)",
        "≤ 2 %",
    )


def serve(
    pool: EnginePool, arrivals: Arrivals, steering: Steering
) -> tuple[list[float], list[int]]:
    """Replay a trace: requests of one image, answered one after another as they came.

    Returns:
        Each request's latency in seconds, and its degree.
    """
    images = sample_images(pool.spec, 1)
    waiting: queue.SimpleQueue[float | None] = queue.SimpleQueue()
    began = time.perf_counter()

    def arrive() -> None:
        for arrival in map(float, arrivals):
            time.sleep(max(0.0, arrival - (time.perf_counter() - began)))
            waiting.put(arrival)
        waiting.put(None)

    threading.Thread(target=arrive).start()
    state = steering.start()
    latencies, degrees = [], []
    while (arrival := waiting.get()) is not None:
        start = time.perf_counter() - began
        state = steering.step(state, Load(start, waiting.qsize() + 1, start - arrival))
        pool.switch(state.degree).run(images)
        end = time.perf_counter() - began
        state = steering.measured(state, state.degree, end - start)
        latencies.append(end - arrival)
        degrees.append(state.degree)
    return latencies, degrees


def steered(bundle: Path) -> list[Row]:
    """The burst trace served for real, steered for two latencies and at each fixed degree."""
    images = sample_images(Bundle.open(bundle).spec, 1)
    with EnginePool(bundle) as pool:
        seconds: dict[int, list[float]] = {target: [] for target in TARGETS}
        for _ in range(20):
            for target in TARGETS:
                start = time.perf_counter()
                pool.switch(target).run(images)
                seconds[target].append(time.perf_counter() - start)
        typical = {target: median(times) for target, times in seconds.items()}
        slos = [ratio * typical[0] for ratio in SLO_RATIOS]
        arrivals = synthetic("burst", 1 / typical[0], TRACE_SECONDS)
        fixed = {
            t: serve(pool, arrivals, Steering(typical, 1, floor=t, ceiling=t)) for t in TARGETS
        }
        free = [serve(pool, arrivals, Steering(typical, slo)) for slo in slos]
    faster = ", ".join(f"r{t:02d} {typical[0] / typical[t]:.2f}×" for t in TARGETS[1:])
    rows = []
    for slo, best in zip(slos, free, strict=True):
        met = {t: 100 * float((np.array(times) <= slo).mean()) for t, (times, _) in fixed.items()}
        others = ", ".join(f"r{t:02d} {percent:.0f} %" for t, percent in met.items())
        found = outcome(*best, slo)
        rows.append(
            (
                f"burst trace served for real: bursts of 1.5× what dense DeiT-S serves, "
                f"{len(arrivals)} requests in {TRACE_SECONDS} s, wanted within {1000 * slo:.0f} ms",
                f"steered {found.met:.1f} % in time at a mean degree of {found.mean_degree:.1f}, "
                f"{found.switches} switches; fixed: {others}. A single request is faster by: "
                f"{faster}",
                "≥ 95 % where r = 0 meets < 60 %, mean degree below 16",
            )
        )
    return rows


def measure() -> list[Row]:
    """All of it, in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = built(SMALL, folder, TARGETS)
        rows = [memory(bundle), overhead(bundle), switching(bundle)]
        return [*rows, *steered(bundle), refitting(folder)]

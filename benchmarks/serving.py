"""An EnginePool while it serves: switching, refitting, memory, overhead, and steering by load."""

from __future__ import annotations

import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from building import time_torch_export
from common import Row, build_bundle, make_bank

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.serving.arrivals import Arrivals, draw_arrivals
from tocom_export.engines.serving.simulation import summarise_requests
from tocom_export.engines.serving.steering import Load, Steering
from tocom_export.engines.verify import sample_images

SMALL, BASE = "deit_small_patch16_224", "deit_base_patch16_224"
TARGETS = (0, 4, 8, 12, 16)
DENSE, FASTEST = "r00", "r16"
SLO_RATIOS = (6, 10)
"""The latency wanted, over that of one request to the dense model."""
SWITCH_SECONDS, TRACE_SECONDS = 30, 60
BATCHES = (1, 2, 4, 8)
"""Of requests that are served together."""

PSS = """
import sys
from tocom_export import EnginePool
from tocom_export.engines.verify import sample_images
from tocom_export.io.memory import read_memory
pool = EnginePool(sys.argv[1], variants=sys.argv[2].split(","))
images = sample_images(pool.spec, 8)
for name in pool.variants:
    pool.switch(name)
    pool.run(images)
print(read_memory())
"""


def time_switching(bundle: Path) -> Row:
    """Time of a switch while eight threads ask, and whether each answer is its variant's."""
    images = sample_images(Bundle.open(bundle).spec, 1)
    took: list[float] = []
    answered, wrong = 0, 0
    with EnginePool(bundle, threads=1) as pool:
        wanted = {name: pool.switch(name).run(images) for name in pool.variants}
        until = time.monotonic() + SWITCH_SECONDS
        counts: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

        def ask() -> None:
            right, others = 0, 0
            while time.monotonic() < until:
                serving = pool.serving
                same = np.array_equal(serving.run(images), wanted[serving.variant.name])
                right, others = right + same, others + (not same)
            counts.put((right, others))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        rng = np.random.default_rng(0)
        while time.monotonic() < until:
            name = str(rng.choice(pool.variants))
            start = time.perf_counter()
            pool.switch(name)
            took.append(time.perf_counter() - start)
            time.sleep(0.01)
        for thread in threads:
            thread.join()
            right, others = counts.get(timeout=1)
            answered, wrong = answered + right, wrong + others
    middle, most, worst = (1000 * float(np.quantile(took, q)) for q in (0.5, 0.99, 1))
    return (
        f"`switch` between open engines of DeiT-S while eight threads ask, {SWITCH_SECONDS} s",
        f"median {1000 * middle:.0f} µs, 99 % within {most:.2f} ms, longest {worst:.2f} ms of "
        f"{len(took)}; {answered} answers, {wrong} of another variant than the one that served",
        "≤ 1 ms, none lost or mixed",
    )


def time_refitting(folder: Path) -> Row:
    """One variant of DeiT-B refitted, against exporting it again with torch."""
    steps = ToComBank.load(make_bank(BASE, folder))
    took = []
    with EnginePool(build_bundle(BASE, folder, TARGETS), variants=[FASTEST], threads=2) as pool:
        for source in (4, 0, 8, 0, 12):
            start = time.perf_counter()
            pool.refit(bank=steps, source=source)
            took.append(time.perf_counter() - start)
    theirs = time_torch_export(16, folder / "torch.onnx")
    ours = median(took)
    return (
        "`refit` of one variant of DeiT-B in a pool (bake, open, run once, swap), median of five, "
        "over torch.onnx.export(dynamo=True) of the same",
        f"{ours:.2f} s against {theirs:.1f} s: {theirs / ours:.0f}×",
        "≤ 1 s, ≥ 50×",
    )


def compare_memory(bundle: Path) -> Row:
    """A process with all variants open over one with r00."""

    def measure(*variants: str) -> int:
        line = [sys.executable, "-c", PSS, bundle, ",".join(variants)]
        return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)

    five, one = measure(*Bundle.open(bundle).variants), measure(DENSE)
    return (
        "memory (PSS) of a pool with five variants of DeiT-S open that have run, over one",
        f"{five / 1e6:.0f} MB over {one / 1e6:.0f} MB: {five / one:.2f}×",
        "≤ 1.8×",
    )


def time_overhead(bundle: Path) -> Row:
    """A run through the pool over one of its own bare session, in turns."""
    images = sample_images(Bundle.open(bundle).spec, 1)
    with EnginePool(bundle, variants=[FASTEST]) as pool:
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
) -> tuple[list[float], list[str]]:
    """Replay a trace: requests of one image, answered in batches in the order in which they came.

    Returns:
        Each request's latency in seconds, and its variant.
    """
    images = sample_images(pool.spec, BATCHES[-1])
    coming: queue.SimpleQueue[float] = queue.SimpleQueue()
    began = time.perf_counter()

    def arrive() -> None:
        for arrival in map(float, arrivals):
            time.sleep(max(0.0, arrival - (time.perf_counter() - began)))
            coming.put(arrival)

    threading.Thread(target=arrive).start()
    state, waiting = steering.start(), deque[float]()
    latencies: list[float] = []
    variants: list[str] = []
    while len(latencies) < len(arrivals):
        if not waiting:
            waiting.append(coming.get())
        while not coming.empty():
            waiting.append(coming.get())
        start = time.perf_counter() - began
        slacks = [arrival + steering.slo - start for arrival in waiting]
        state = steering.step(state, Load(start, len(waiting), start - waiting[0], slacks))
        batch = [waiting.popleft() for _ in range(state.batch)]
        pool.switch(state.variant).run(images[: len(batch)])
        end = time.perf_counter() - began
        state = steering.observe(state, state.variant, end - start, len(batch))
        latencies += [end - arrival for arrival in batch]
        variants += [state.variant] * len(batch)
    return latencies, variants


def time_batches(pool: EnginePool) -> dict[str, dict[int, float]]:
    """Variant → batch → median seconds, in turns."""
    images = sample_images(pool.spec, BATCHES[-1])
    seconds = {name: {batch: list[float]() for batch in BATCHES} for name in pool.variants}
    for _ in range(20):
        for name, times in seconds.items():
            for batch in BATCHES:
                start = time.perf_counter()
                pool.switch(name).run(images[:batch])
                times[batch].append(time.perf_counter() - start)
    return {name: {n: median(found) for n, found in of.items()} for name, of in seconds.items()}


def steer(bundle: Path) -> list[Row]:
    """The burst trace served for real, steered for two latencies and by each variant alone."""
    with EnginePool(bundle) as pool:
        seconds = time_batches(pool)
        single = {name: times[1] for name, times in seconds.items()}
        degrees = {name: pool.bundle.variants[name].degree or 0 for name in pool.variants}
        slos = [ratio * single[DENSE] for ratio in SLO_RATIOS]
        arrivals = draw_arrivals("burst", 1 / single[DENSE], TRACE_SECONDS)
        choices = (None, *((name,) for name in seconds))
        runs = [
            {v: serve(pool, arrivals, Steering(seconds, slo, variants=v)) for v in choices}
            for slo in slos
        ]
    faster = ", ".join(f"{n} {single[DENSE] / s:.2f}×" for n, s in single.items() if n != DENSE)
    rows = []
    for slo, served in zip(slos, runs, strict=True):
        latencies, variants = served.pop(None)
        met = {name: summarise_requests(*found, slo).met for (name,), found in served.items()}
        others = ", ".join(f"{name} {percent:.0f} %" for name, percent in met.items())
        found = summarise_requests(latencies, variants, slo)
        mean = sum(degrees[name] for name in variants) / len(variants)
        rows.append(
            (
                f"burst trace served for real: bursts of 1.5× what dense DeiT-S serves, "
                f"{len(arrivals)} requests in {TRACE_SECONDS} s, wanted within {1000 * slo:.0f} ms",
                f"steered {found.met:.1f} % in time at a mean degree of {mean:.1f}, "
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
        bundle = build_bundle(SMALL, folder, TARGETS)
        rows = [compare_memory(bundle), time_overhead(bundle), time_switching(bundle)]
        return [*rows, *steer(bundle), time_refitting(folder)]

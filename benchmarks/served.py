"""`serve` under load: bursts and steady traffic to a server of DeiT-S, steered and fixed.

python benchmarks/served.py [--model deit_small_patch16_224] [--seconds 60] [--threads 2]

Client and server share the machine's processors. Weights are random; the accuracies by which
answers are weighed are those of the model inside the package at the same degrees. The dense model's
latency is measured first, of single requests over HTTP; rates are over what one by one it serves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from common import Row, build_bundle, start_server

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.verify import sample_images
from tocom_export.model.catalogue import REFERENCE_ACCURACY

SMALL = "deit_small_patch16_224"
TARGETS = (0, 4, 8, 12, 16)
FIXED = ("r12", "r16")
"""Beside which steering is set: cheaper ones aren't, dearer ones are late by far."""
SEEDS = (0, 1, 2)
RATIO = 6
"""The latency wanted, over the dense model's."""
BURST, STEADY = 1.5, 0.7
"""Of what the dense model serves: bursts, in turns with a third of them, and steady traffic."""


def send_load(address: str, bundle: Path, slo_ms: float, seconds: float, *more: str) -> Any:
    """What benchmarks/load.py says of a server."""
    load = Path(__file__).with_name("load.py")
    line = [sys.executable, str(load), f"http://{address}", "--model", "m", "--json"]
    line += ["--slo-ms", str(slo_ms), "--duration", str(seconds), "--bundle", str(bundle), *more]
    return json.loads(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout)


def time_dense(bundle: Path, requests: int = 40) -> float:
    """Milliseconds of a request to the dense model, one after another; their median."""
    with start_server(bundle, "--variant", "r00") as address:
        client = triton.InferenceServerClient(address)
        images = sample_images(Bundle.open(bundle).spec, 1)
        tensor = triton.InferInput("images", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images)
        took = []
        for _ in range(requests):
            start = time.perf_counter()
            client.infer("m", [tensor])
            took.append(1000 * (time.perf_counter() - start))
        client.close()
    return float(np.median(took[5:]))


def describe(found: Any) -> str:
    """One run's figures."""
    served = ", ".join(f"{name} {share:.0f} %" for name, share in found["shares"].items())
    lost = f", {found['sent'] - found['answered']} lost" if found["failures"] else ""
    late = f", client late by {found['lag_ms']:.0f} ms" if found["lag_ms"] > 5 else ""
    return f"{found['met']:.1f} %, {found['accuracy']:.2f} % accurate ({served}{lost}{late})"


def measure(model: str = SMALL, seconds: float = 60, threads: int = 2) -> list[Row]:
    """Bursts, steered and at fixed variants, and steady traffic."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_bundle(model, Path(folder), TARGETS)
        known = {f"r{degree:02d}": REFERENCE_ACCURACY["tome"][degree] for degree in TARGETS}
        dataclasses.replace(Bundle.open(bundle), accuracy=known).save_manifest()
        dense = time_dense(bundle)
        slo, rate = RATIO * dense, 1000 / dense
        burst = ("--shape", "burst", "--rate", str(rate * BURST / 1.5))
        cores = ("--threads", str(threads))
        for seed in SEEDS:
            with start_server(bundle, "--slo-ms", str(slo), *cores) as address:
                found = send_load(address, bundle, slo, seconds, *burst, "--seed", str(seed))
            what = f"bursts of {BURST}× dense, SLO {slo:.0f} ms ({RATIO}×), steered, seed {seed}"
            rows.append((what, describe(found), "≥ 95 % in time"))
        for name in FIXED:
            with start_server(bundle, "--variant", name, *cores) as address:
                found = send_load(address, bundle, slo, seconds, *burst, "--seed", str(SEEDS[0]))
            rows.append((f"the same, {name} alone, seed {SEEDS[0]}", describe(found), "beside it"))
        steady = ("--rate", str(rate * STEADY), "--seed", "0")
        with start_server(bundle, "--slo-ms", str(slo), *cores) as address:
            found = send_load(address, bundle, slo, seconds, *steady)
        rows.append(
            (
                f"steady at {STEADY}× dense ({dense:.1f} ms)",
                describe(found),
                "≥ 99 % in time, r00 for ≥ 90 %",
            )
        )
    return rows


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMALL)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    for row in measure(**vars(parser.parse_args())):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

"""What a server adds to a request: Triton's client over HTTP against the bare pool, in turns.

python benchmarks/overhead.py [--requests N] [--model NAME] [--variant r00]

The server is a process of its own, as it would be; requests come one at a time, of one image in
binary. Both run the same variant, with as many threads as ONNX Runtime chooses.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from common import Row, build_bundle, start_server

from tocom_export import EnginePool
from tocom_export.engines.verify import sample_images

SMALL = "deit_small_patch16_224"
REQUESTS = 300


def time_overhead(bundle: Path, variant: str, requests: int = REQUESTS) -> Row:
    """Latency of a request to the server over that of the same run in the pool."""
    with (
        start_server(bundle, "--variant", variant) as address,
        EnginePool(bundle, variants=[variant]) as pool,
        triton.InferenceServerClient(address) as client,
    ):
        images = sample_images(pool.spec, 1)
        tensor = triton.InferInput("images", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images)
        calls = {"server": partial(client.infer, "m", [tensor]), "pool": partial(pool.run, images)}
        np.testing.assert_allclose(
            calls["server"]().as_numpy("logits"), calls["pool"](), rtol=1e-3, atol=1e-4
        )
        took: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(requests + 10):
            for name in calls if turn % 2 else reversed(calls):
                start = time.perf_counter()
                calls[name]()
                if turn >= 10:
                    took[name].append(time.perf_counter() - start)
    server, bare = (1000 * np.array(took[name]) for name in ("server", "pool"))
    ratio, added = float(np.median(server / bare)), float(np.median(server - bare))
    return (
        f"a request to `serve` for one image of DeiT-S, {variant}, in binary by Triton's client, "
        "over the same run in a pool",
        f"{100 * (ratio - 1):+.1f} % ({added:+.2f} ms; {np.median(bare):.1f} ms alone), median of "
        f"{requests} pairs",
        "≤ 8 %",
    )


def measure() -> list[Row]:
    """Of the dense model, and of the cheapest variant, to which a server adds most."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_bundle(SMALL, Path(folder), (0, 16))
        return [time_overhead(bundle, variant) for variant in ("r00", "r16")]


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--model", default=SMALL)
    parser.add_argument("--variant", default="r00")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_bundle(options.model, Path(folder), (int(options.variant[1:]),))
        print(" | ".join(time_overhead(bundle, options.variant, options.requests)))


if __name__ == "__main__":
    main()

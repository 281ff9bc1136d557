"""The pool of ``tocom-export triton --backend python``, under NVIDIA's own Triton, on a processor.

python scripts/try_triton.py [--seconds 60] [--clients 8] [--threads N] [--out FILE]
                             [--model NAME --checkpoint FILE --bank FILE]

scripts/triton_server.py says where Triton comes from. First what a request of one image takes: in
a pool of this process, over HTTP and over gRPC, in turns. Then a soak: clients over gRPC, while
the pool is switched and refitted by requests; each answer is held against an engine of the same
variant and the same weights, to 1e-5 of the largest logit. Prints what was measured and counted as
JSON, and exits with 1 if an answer was wrong or lost, or if the model's process grew. Without
--model, the one inside the package.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from remote_pool import RemotePool
from soak import Soak, passed
from triton_server import Missing, Server, find_environment, run_triton

from tocom_export import EnginePool, load
from tocom_export.engines.bench.timing import time_engines
from tocom_export.engines.serving.triton import write_repository
from tocom_export.engines.serving.triton_options import TritonOptions
from tocom_export.engines.verify import sample_images
from tocom_export.io.memory import read_own_memory
from tocom_export.preparing import prepare

NAME = "tried"
TOLERANCE = 1e-5
TIMED = 2
"""Seconds for each way of asking."""
ROUNDS, EACH = 5, 20
"""Of requests whose processor time is added up: it is told in steps of 10 ms."""


def soak_triton(
    soak: Soak, server: Server, folder: Path, seconds: float, clients: int, process: int
) -> Any:
    """What a soak finds that asks Triton instead of its own pool; ``process`` is the model's."""
    soak.pool.close()
    soak.pool = RemotePool(server.grpc, NAME, soak.pool.variants, soak.images[0], folder)
    largest = max(np.abs(logits).max() for found in soak.wanted.values() for logits in found)
    soak.tolerance = TOLERANCE * float(largest)
    soak.read_memory = partial(read_own_memory, Path(f"/proc/{process}/smaps_rollup"))
    _check_distinct(soak)
    return soak.run(seconds, clients)


def _check_distinct(soak: Soak) -> None:
    """Answers of other weights must be told from rounding."""
    for which in range(len(soak.images)):
        found = np.stack([logits[which] for logits in soak.wanted.values()])
        apart = np.abs(found[:, None] - found[None]).max(axis=(2, 3))
        equal = apart < 10 * soak.tolerance
        # A variant without a gap is the same at each scale.
        names = [name for _, name in soak.wanted]
        if any(names[i] != names[j] for i, j in zip(*np.nonzero(equal), strict=True)):
            raise SystemExit("the variants' answers are too alike to be told apart")


def time_requests(bundle: Path, server: Server, folder: Path, threads: int | None) -> Any:
    """Variant → way → milliseconds of a request of one image, for the dearest and the cheapest.

    The processors' time, of this process, the server and the model together, is what a request
    takes on a machine that has other work, too.
    """
    with EnginePool(bundle, threads=threads) as pool:
        images = sample_images(pool.spec, 1)
        chosen = pool.variants[0], pool.variants[-1]
        remote = RemotePool(server.grpc, NAME, chosen, images, folder)
        runs: dict[tuple[str, str], Callable[[], object]] = {}
        for name in chosen:
            runs[name, "pool"] = partial(pool.run, images, name)
            runs[name, "gRPC"] = partial(remote.infer, images, variant=name)
        with suppress(ImportError, RuntimeError):  # it is in nvidia-pytriton's environment
            runs |= {(n, "HTTP"): _ask_http(server.http, images, n) for n in chosen}
        timings = time_engines(runs, 1, TIMED)
        work = _measure_work(runs, [server.process.pid, *server.find_model_processes()])
    found: dict[str, Any] = {name: {} for name in chosen}
    for (name, way), timing in timings.items():
        found[name][way] = {
            "median_ms": timing.median_ms, "min_ms": timing.min_ms, "processor_ms": work[name, way]
        }  # fmt: skip
    return found


def _measure_work(
    runs: Mapping[tuple[str, str], Callable[[], object]], others: Sequence[int]
) -> dict[tuple[str, str], float]:
    """Milliseconds of processor time of a run, of this process and others; the median round."""
    tick = os.sysconf("SC_CLK_TCK")

    def read() -> float:
        seconds = time.process_time()
        for pid in others:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / tick
        return seconds

    took: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(ROUNDS):
        for key, run in runs.items():
            before = read()
            for _ in range(EACH):
                run()
            took[key].append(1000 * (read() - before) / EACH)
    return {key: median(found) for key, found in took.items()}


def _ask_http(url: str, images: Any, variant: str) -> Callable[[], object]:
    import tritonclient.http as triton

    client = triton.InferenceServerClient(url)
    given = triton.InferInput("images", list(images.shape), "FP32")
    given.set_data_from_numpy(images)
    parameters = {"variant": variant}
    return lambda: client.infer(NAME, [given], parameters=parameters).as_numpy("logits")


def main() -> None:
    """Read the options, run, and print."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seconds", type=float, default=60, help="of the soak; 0: none")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of an engine")
    parser.add_argument("--model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--bank")
    parser.add_argument("--out", type=Path, help="write the JSON there, too")
    options = parser.parse_args()
    try:
        environment = find_environment()
    except Missing as error:
        raise SystemExit(str(error)) from None
    blueprint = prepare(options.model, checkpoint=options.checkpoint, bank=options.bank)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        soak = Soak(blueprint, folder)
        written = TritonOptions(
            "python", NAME, threads=options.threads, control=True, max_delay_ms=0
        )
        write_repository(load(soak.bundle), folder / "models", written)
        with run_triton(environment, folder / "models", folder) as server:
            took = time_requests(soak.bundle, server, folder, options.threads)
            found = None
            if options.seconds > 0:
                (process,) = server.find_model_processes()
                given = options.seconds, options.clients, process
                found = soak_triton(soak, server, folder, *given)
    text = json.dumps({"requests": took, "soak": found}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", "utf-8")
    sys.exit(0 if found is None or passed(found) else 1)


if __name__ == "__main__":
    main()

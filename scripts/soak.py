"""Concurrent requests against a pool that is switched and refitted at random, for a while.

python scripts/soak.py [--seconds 600] [--threads 8] [--model NAME --checkpoint FILE --bank FILE]
                       [--arrivals FILE] [--out FILE]

Each answer is held against an engine of the same variant and the same weights, opened from a bundle
that was built so: equal in every bit, or it counts as wrong. Prints what was counted as JSON, and
exits with 1 if an answer was wrong or lost, or if the memory's median in the last tenth of the
time is more than a hundredth above that in the second tenth. That is memory of its own: what a
process takes of libraries and files changes with what else runs. Without --model, the one inside
the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tocom_export import EnginePool
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.verify import sample_images
from tocom_export.errors import ImageError
from tocom_export.io.memory import read_own_memory
from tocom_export.preparing import prepare

GROWTH = 0.01
BATCHES = (1, 2, 3)


@dataclass(frozen=True)
class Weights:
    """What the pool may be refitted with; the scale, unlike the others', tells it from them."""

    checkpoint: Path
    source: int
    scale: float


class Soak:
    """What is asked of a pool, what must come back, and what was counted."""

    def __init__(self, blueprint: Blueprint, folder: Path, arrivals: bool = False) -> None:
        own, other = folder / "own.safetensors", folder / "other.safetensors"
        weights = blueprint.weights
        tensors = {n: np.asarray(t, np.float32) for n, t in weights.checkpoint.tensors.items()}
        save_file(tensors, own)
        save_file({name: t * np.float32(1.01) for name, t in tensors.items()}, other)
        self.choices = [
            Weights(own, 0, 0.1), Weights(own, 8, 0.2), Weights(other, 0, 0.3),
            Weights(other, 8, 0.4),
        ]  # fmt: skip
        self.bank = weights.bank
        self.images = [sample_images(weights.spec, batch) for batch in BATCHES]
        self.wanted: dict[tuple[float, str], list[np.ndarray]] = {}
        for number, choice in enumerate(self.choices):
            checkpoint = Checkpoint.open(choice.checkpoint)
            changed = dataclasses.replace(
                blueprint,
                weights=dataclasses.replace(weights, checkpoint=checkpoint),
                variants={
                    name: dataclasses.replace(variant, source=choice.source, scale=choice.scale)
                    for name, variant in blueprint.variants.items()
                },
            )
            bundle = write_bundle(changed, folder / f"bundle{number}")
            for name in bundle.variants:
                engine = OnnxEngine(bundle, name, threads=1)
                self.wanted[choice.scale, name] = [engine.run(images) for images in self.images]
        self.bundle = folder / "bundle0"
        self.pool: Any = EnginePool(self.bundle, threads=1)
        self.tolerance = 0.0
        self.read_memory = read_own_memory
        self.count: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.failures: list[str] = []
        # Kept only on demand: a million times take as much memory as the growth that is looked for.
        self.arrivals: list[float] | None = [] if arrivals else None
        self.memory: list[tuple[float, int]] = []

    def ask(self, until: float, seed: int) -> None:
        """One client: requests one after another, with pauses, and a broken one now and then."""
        dice = random.Random(seed)
        count: Counter[str] = Counter()
        while time.monotonic() < until:
            time.sleep(dice.expovariate(1 / 0.01))
            which = dice.randrange(len(self.images))
            count["requests"] += 1
            if self.arrivals is not None:
                self.arrivals.append(time.monotonic())
            serving = self.pool.serving
            try:
                if dice.random() < 0.01:
                    broken = self.images[which].copy()
                    broken[0, 0, 0, 0] = np.nan
                    try:
                        serving.run(broken)
                        count["wrong"] += 1
                    except ImageError:
                        count["refused"] += 1
                    continue
                logits = serving.run(self.images[which])
            except Exception as error:
                count["lost"] += 1
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            wanted = self.wanted[serving.variant.scale, serving.variant.name][which]
            same = np.allclose(logits, wanted, rtol=0, atol=self.tolerance)
            count["right" if same else "wrong"] += 1
        with self.lock:
            self.count.update(count)

    def alter(self, until: float, seed: int) -> None:
        """Switches and refits, some of which must fail, and a look at the memory after each."""
        dice = random.Random(seed)
        known = self.choices[0].checkpoint
        while time.monotonic() < until:
            for _ in range(dice.randrange(20)):
                name = dice.choice(self.pool.variants)
                found = self.pool.switch(name).variant.name, self.pool.serving.variant.name
                if found != (name, name):
                    self.failures.append(f"the switch to {name} did nothing")
                self.count["switches"] += 1
                time.sleep(dice.expovariate(1 / 0.02))
            choice = dice.choice(self.choices)
            file = None if choice.checkpoint == known else choice.checkpoint
            if dice.random() < 0.1:
                try:
                    self.pool.refit(bank=self.bank, scale=1e39)
                    self.failures.append("a refit that had to fail did not")
                except Exception:
                    self.count["refits refused"] += 1
                continue
            self.pool.refit(
                checkpoint=file, bank=self.bank, source=choice.source, scale=choice.scale
            )
            known = choice.checkpoint
            if self.pool.serving.variant.scale != choice.scale:
                self.failures.append(f"the refit to scale {choice.scale} did nothing")
            self.count["refits"] += 1
            if (memory := self.read_memory()) is not None:
                self.memory.append((time.monotonic(), memory))

    def run(self, seconds: float, threads: int) -> dict[str, Any]:
        """All of it for so many seconds; what was counted."""
        began = time.monotonic()
        until = began + seconds
        workers = [threading.Thread(target=self.ask, args=(until, n)) for n in range(threads)]
        workers.append(threading.Thread(target=self._guard, args=(until,)))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.pool.close()

        def typical(start: float, end: float) -> float | None:
            found = [m for at, m in self.memory if start <= (at - began) / seconds <= end]
            return median(found) if found else None

        tenths = [typical(part / 10, part / 10 + 0.1) for part in range(10)]
        early, late = tenths[1], tenths[9]
        return {
            "seconds": seconds,
            "threads": threads,
            **dict(sorted(self.count.items())),
            "memory": tenths,
            "growth": late / early - 1 if early and late else None,
            "failures": self.failures[:10],
        }

    def _guard(self, until: float) -> None:
        try:
            self.alter(until, 99)
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")


def passed(found: dict[str, Any]) -> bool:
    """Whether nothing was wrong or lost, all was answered, and memory stayed what it was.

    Where the system says nothing of memory, or nothing was refitted at either end, it isn't judged.
    """
    answered = found["right"] + found.get("refused", 0) == found["requests"]
    return answered and not found["failures"] and (found["growth"] or 0) <= GROWTH


def main() -> None:
    """Read the options, run, and print."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--model")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--bank")
    parser.add_argument("--arrivals", type=Path, help="write when each request came, seconds")
    parser.add_argument("--out", type=Path, help="write the JSON there, too")
    options = parser.parse_args()
    blueprint = prepare(options.model, checkpoint=options.checkpoint, bank=options.bank)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(blueprint, Path(folder), arrivals=options.arrivals is not None)
        found = soak.run(options.seconds, options.threads)
    text = json.dumps(found, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", "utf-8")
    if options.arrivals and soak.arrivals:
        times = np.sort(soak.arrivals)
        options.arrivals.write_text("".join(f"{t - times[0]:.4f}\n" for t in times), "utf-8")
    sys.exit(0 if passed(found) else 1)


if __name__ == "__main__":
    main()

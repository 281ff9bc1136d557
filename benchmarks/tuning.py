"""Schedules that were searched, beside the constant degree of the same latency on this machine.

python benchmarks/tuning.py CHECKPOINT --bank FILE --images DIR --data FOLDER

CHECKPOINT is a model of source 0, --images are the pictures that are searched with (labels aren't
read), --data its labelled test images. For ONNX Runtime and OpenVINO, at batch 1 and 8, the latency
of constant 16 and of constant 8 is the budget: the variant that `tune` finds, and the constant
one, are measured on the test images. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from common import describe_machine

from tocom_export import export
from tocom_export.bundle.opening import Bundle
from tocom_export.engines.bench.timing import time_engines
from tocom_export.engines.opening import open_engine
from tocom_export.engines.subject import make_subject
from tocom_export.engines.tuning.adding import tune_bundle
from tocom_export.engines.tuning.budget import Budget
from tocom_export.engines.verify import sample_images
from tocom_export.study.accuracy import measure_accuracy
from tocom_export.training.data.evaluation import open_bundle_data

BACKENDS, BATCHES, CONSTANTS = ("onnx", "openvino"), (1, 8), ("r16", "r08")
SECONDS = 2.0


@dataclass(frozen=True)
class Pair:
    """A constant degree, and the variant that was found for its latency; milliseconds."""

    backend: str
    batch: int
    whole_ms: float
    names: tuple[str, str]
    ms: tuple[float, float]


def compare(path: Path, bank: Path, images: Path, backend: str, batch: int) -> Iterator[Pair]:
    """Find a variant for the latency of each constant degree, and time both in turns."""

    def time(*names: str) -> list[float]:
        bundle = Bundle.open(path)
        picture = sample_images(bundle.spec, batch)
        runs = {
            name: partial(
                open_engine(bundle, bundle.variant(name), backend=backend, batch=batch).run, picture
            )
            for name in names
        }
        return [timing.min_ms for timing in time_engines(runs, batch, SECONDS).values()]

    whole, *limits = time("r00", *CONSTANTS)
    for constant, limit in zip(CONSTANTS, limits, strict=True):
        name = f"as-{constant}-{backend}-b{batch}"
        budget = Budget("ms", limit)
        tune_bundle(path, images, [budget], name=name, bank=bank, batch=batch, backend=backend)
        names = (constant, name)
        first, second = time(*names)
        yield Pair(backend, batch, whole, names, (first, second))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    for name in ("bank", "images"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        export(None, path, checkpoint=options.checkpoint, bank=options.bank, targets=[0, 8, 16])
        pairs = [
            pair
            for backend, batch in product(BACKENDS, BATCHES)
            for pair in compare(path, options.bank, options.images, backend, batch)
        ]
        bundle = Bundle.open(path)
        subject = make_subject(bundle)
        data = open_bundle_data(bundle, options.data, 250)
        scores = measure_accuracy([subject.runner(v) for v in subject.variants], data)
    accuracy = dict(zip(bundle.variants, (score.accuracy for score in scores), strict=True))
    print(f"{describe_machine()}; {options.checkpoint.name}, {options.data}")
    print("| backend | batch | r00, ms | constant | ms | % | found | ms | % |")
    print("|---|---:|---:|---|---:|---:|---|---:|---:|")
    for pair in pairs:
        constant, found = pair.names
        cells = [pair.backend, str(pair.batch), f"{pair.whole_ms:.2f}"]
        cells += [constant, f"{pair.ms[0]:.2f}", f"{accuracy[constant]:.2f}"]
        cells += [bundle.variant(found).label, f"{pair.ms[1]:.2f}", f"{accuracy[found]:.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

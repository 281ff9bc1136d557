"""Accuracy of the shipped model where it merges, or prunes, in few layers only.

python benchmarks/seldom.py IMAGES

IMAGES: a folder of test images with a sub-folder for each of the model's classes, called like it.
Each rule stands below the constant degree that it may not cost more than, all with the shipped
bank. Prints a Markdown table.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from common import describe_machine

from tocom_export.bundle.writing import write_bundle
from tocom_export.compression.rules import list_degrees
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.errors import DegreeError
from tocom_export.preparing import prepare
from tocom_export.study.accuracy import Score, measure_accuracy
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.opening import open_images
from tocom_export.variant import Variant

TARGETS, STEPS = (8, 12, 16), (2, 3)
BATCH = 250
SPEC = prepare().weights.spec


def list_schedules(target: int) -> dict[str, str]:
    """A variant's name → the rule that costs as much as a constant degree, where there is one."""
    found = {}
    for step in STEPS:
        rule = f"every:{step}:{target}"
        try:
            list_degrees(SPEC, rule)
            found[rule.replace(":", "-")] = rule
        except DegreeError as error:
            print(error, file=sys.stderr)
    return found


def measure(method: str, schedules: Mapping[str, str], images: Path) -> dict[str, Score]:
    """What each variant's engine says of the images."""
    blueprint = prepare(targets=(0, *TARGETS), schedules=schedules, method=method)
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(blueprint, Path(folder) / "bundle")
        data = EvalData(open_images(images), bundle.spec, bundle.preprocess, BATCH)
        if data.classes != bundle.classes:
            sys.exit(f"{images}: its sub-folders are not the classes of the model.")
        runs = [OnnxEngine(bundle, name).run for name in bundle.variants]
        return dict(zip(bundle.variants, measure_accuracy(runs, data), strict=True))


def format_row(schedule: str, variant: Variant, score: Score, constant: Score) -> str:
    """Of the table; the interval is that of a difference on the same images."""
    macs = variant.schedule(SPEC).macs(SPEC) / 1e6
    difference = score.compare(constant)
    low, high = difference.interval
    lost = "-" if score is constant else f"{difference.points:+.2f} ({low:+.2f} to {high:+.2f})"
    return f"{schedule} | {variant.label} | {macs:.1f} M | {score.accuracy:.2f} % | {lost}"


def main(images: Path) -> None:
    """Build, run and compare."""
    rules = {target: list_schedules(target) for target in TARGETS}
    schedules = {name: rule for found in rules.values() for name, rule in found.items()}
    variants = prepare(targets=(0, *TARGETS), schedules=schedules).variants
    print(f"\n{datetime.date.today()}, {describe_machine()}\n")
    print("| method | schedule | degrees | MACs | top-1 | against the constant (95 %) |")
    print("|---|---|---|---:|---:|---:|")
    for method in ("tome", "evit"):
        scores = measure(method, schedules, images)
        for target in (0, *TARGETS):
            constant = f"r{target:02d}"
            rows = {constant: f"constant {target}", **rules.get(target, {})}
            for name, schedule in rows.items():
                row = format_row(schedule, variants[name], scores[name], scores[constant])
                print(f"| {method} | {row} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

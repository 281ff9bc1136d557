"""Accuracy of the shipped model in each precision, beside float32 PyTorch's, on labelled images.

python benchmarks/precision.py IMAGES CALIBRATION [--count N] [--backends onnx,openvino]

IMAGES: a folder <class>/<image> whose classes are the model's. CALIBRATION: other images, for int8.
Prints two Markdown tables for merging and two for pruning: accuracy, and agreement. In brackets the
difference to PyTorch in points and its 95 % interval; bold is what fails ``verify --data``.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import describe_machine
from PIL import Image

from tocom_export.bundle.writing import Blueprint
from tocom_export.engines.accuracy import AccuracyCheck
from tocom_export.engines.opening import Backend, open_engine
from tocom_export.errors import DeviceError, MissingPackageError
from tocom_export.exporting import write
from tocom_export.graph.precision import Precision
from tocom_export.preparing import prepare
from tocom_export.study.accuracy import Score, find_reach, measure_accuracy
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.images import LabelledImages
from tocom_export.training.data.opening import open_images
from tocom_export.training.torch_engine import BankOracle, load_model

TARGETS = (0, 4, 8, 12, 16)
METHODS = {"tome": "Merging", "evit": "Pruning"}
FORMS: dict[str, Precision] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    "int8, ranges at each run": "int8",
}
"""What bundles are made of; the last one with ``calibrate="none"``."""
Batches = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Way:
    """One way to run a bundle's graphs."""

    name: str
    backend: Backend
    options: dict[str, Any] = field(default_factory=dict)
    """Of :func:`open_engine`."""


WAYS = (
    Way("ONNX Runtime", "onnx"),
    Way("OpenVINO in f32", "openvino", {"inference_precision": "f32"}),
    Way("OpenVINO in bf16", "openvino", {"inference_precision": "bf16"}),
)


class Some:
    """So many of a set's images, evenly over it; see :class:`LabelledImages`."""

    def __init__(self, images: LabelledImages, count: int) -> None:
        self.classes, self.name, self._images = images.classes, images.name, images
        self._chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image and its label."""
        return self._images.read(int(self._chosen[index]))

    def where(self, index: int) -> str:
        """Its name."""
        return self._images.where(int(self._chosen[index]))


def load_images(folder: Path, count: int | None, blueprint: Blueprint) -> Batches:
    """The labelled images as the model takes them, read once for all runs."""
    images = open_images(folder)
    assert images.classes == blueprint.classes, f"{folder}: the classes are not the model's"
    chosen = images if count is None else Some(images, count)
    return list(EvalData(chosen, blueprint.weights.spec, blueprint.preprocess, batch=100))


def score_model(blueprint: Blueprint, data: Batches) -> dict[str, Score]:
    """What float32 PyTorch says, by variant."""
    weights = blueprint.weights
    model = load_model(weights.spec, weights.checkpoint.tensors, blueprint.method)
    oracle = BankOracle(model, weights.bank)
    runs = [oracle.runner(variant) for variant in blueprint.variants.values()]
    return dict(zip(blueprint.variants, measure_accuracy(runs, data), strict=True))


def score_engines(
    method: str, form: str, calibration: Path, data: Batches, ways: Sequence[Way]
) -> dict[str, dict[str, Score]]:
    """What a form's engines say, by the way they are run and by variant."""
    precision = FORMS[form]
    blueprint = prepare(targets=TARGETS, method=method, precision=precision)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        ranges = calibration if form == precision else "none"
        calibrate = ranges if precision == "int8" else None
        bundle = write(blueprint, Path(folder) / "bundle", calibrate=calibrate, verify=False)
        for way in ways:
            print(f"{method} {form} {way.name}", file=sys.stderr, flush=True)
            try:
                runs = [
                    open_engine(bundle, variant, backend=way.backend, **way.options).run
                    for variant in bundle.variants.values()
                ]
            except (DeviceError, MissingPackageError) as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            scores = measure_accuracy(runs, data)
            found[way.name] = dict(zip(bundle.variants, scores, strict=True))
    return found


def describe(check: AccuracyCheck) -> str:
    """``30.41 (-0.07: -0.19 to +0.05)``; bold where it failed."""
    low, high = check.difference.interval
    text = (
        f"{check.engine.accuracy:.2f} ({check.difference.points:+.2f}: {low:+.2f} to {high:+.2f})"
    )
    return text if check.passed else f"**{text}**"


def print_table(title: str, lines: Sequence[Sequence[str]]) -> None:
    """A column for each degree."""
    print(f"\n{title}\n\n| | {' | '.join(map(str, TARGETS))} |\n|---|{'---:|' * len(TARGETS)}")
    for line in lines:
        print(f"| {' | '.join(line)} |", flush=True)


def measure_method(
    method: str, calibration: Path, images: Path, count: int | None, ways: Sequence[Way]
) -> None:
    """Run and print the tables of one method."""
    blueprint = prepare(targets=TARGETS, method=method)
    data = load_images(images, count, blueprint)
    model = score_model(blueprint, data)
    reached = [
        f"{score.accuracy:.2f} ± {find_reach(score.accuracy, score.total):.2f}"
        for score in model.values()
    ]
    accuracies, agreements = [["PyTorch, float32", *reached]], []
    for form in FORMS:
        for name, scores in score_engines(method, form, calibration, data, ways).items():
            checks = [
                AccuracyCheck(variant, FORMS[form], name, score, model[variant], "fp32")
                for variant, score in scores.items()
            ]
            accuracies.append([f"{form}, {name}", *map(describe, checks)])
            same = [f"{check.agreement:.1f}" for check in checks]
            agreements.append([f"{form}, {name}", *same])
    total = sum(len(labels) for _, labels in data)
    print_table(f"{METHODS[method]}: top-1 accuracy on {total:,} images, percent", accuracies)
    print_table(f"{METHODS[method]}: images of float32 PyTorch's class, percent", agreements)


def main() -> None:
    """The tables of both methods."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--count", type=int, help="images; default: all")
    parser.add_argument("--backends", default=",".join(dict.fromkeys(w.backend for w in WAYS)))
    given = parser.parse_args()
    ways = [way for way in WAYS if way.backend in given.backends.split(",")]
    print(f"{datetime.date.today()}, {describe_machine()}")
    for method in METHODS:
        measure_method(method, given.calibration, given.images, given.count, ways)


if __name__ == "__main__":
    main()

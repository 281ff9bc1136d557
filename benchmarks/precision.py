"""The shipped model in each precision against float32 PyTorch, on real images.

python benchmarks/precision.py IMAGES CALIBRATION

IMAGES: a folder of test images, of which 1,000 are taken, spread over its sub-folders. CALIBRATION:
other images, for int8. Prints a Markdown table.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import describe_machine

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.onnx.calibration import measure_input_scales
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.verify import Run
from tocom_export.exporting import prepare
from tocom_export.graph.precision import Precision
from tocom_export.model.preprocess import find_images
from tocom_export.training.torch_engine import BankOracle, load_model

IMAGES, CALIBRATION = 1_000, 512
TARGETS = (0, 4, 8, 16)
LEAST: dict[Precision, float] = {"fp16": 99.0, "bf16": 99.0, "int8": 97.0}


def choose_images(folder: Path, count: int) -> list[Path]:
    """So many of the images in a folder, evenly over it."""
    files = find_images(folder)
    return [files[i] for i in np.linspace(0, len(files) - 1, count).astype(int)]


def run_all(run: Run, images: np.ndarray) -> np.ndarray:
    """Logits of all images, a hundred at a time."""
    return np.concatenate([run(images[i : i + 100]) for i in range(0, len(images), 100)])


def write_precision(
    blueprint: Blueprint, precision: Precision, folder: Path, known: np.ndarray
) -> Bundle:
    """A bundle of the precision; int8's ranges are measured on the images ``known``."""
    weights = dataclasses.replace(blueprint.weights, precision=precision)
    return write_bundle(
        dataclasses.replace(blueprint, weights=weights),
        folder / "bundle",
        calibrate=lambda bundle, variant: measure_input_scales(bundle, variant.name, known),
    )


def main(images: Path, calibration: Path) -> None:
    """Build, run and compare."""
    print(f"\n{datetime.date.today()}, {describe_machine()}\n")
    print("| precision | method | variant | same top-1 | median and 99 % of max \\|Δ\\| | bar |")
    print("|---|---|---|---:|---:|---|")
    for method in ("tome", "evit"):
        blueprint = prepare(targets=TARGETS, method=method)
        weights, load = blueprint.weights, blueprint.preprocess.load_batch
        batch = load(choose_images(images, IMAGES), weights.spec.image_size)
        known = load(choose_images(calibration, CALIBRATION), weights.spec.image_size)
        tensors = weights.checkpoint.tensors
        model = load_model(weights.spec, tensors, blueprint.method)
        oracle = BankOracle(model, weights.bank)
        logits = {n: run_all(oracle.runner(v), batch) for n, v in blueprint.variants.items()}
        for precision, least in LEAST.items():
            with tempfile.TemporaryDirectory() as folder:
                bundle = write_precision(blueprint, precision, Path(folder), known)
                for name, wanted in logits.items():
                    found = run_all(OnnxEngine(bundle, name).run, batch)
                    same = 100 * (found.argmax(1) == wanted.argmax(1)).mean()
                    middle, most = np.quantile(np.abs(found - wanted).max(axis=1), (0.5, 0.99))
                    met = "met" if same >= least else "**missed**"
                    print(
                        f"| {precision} | {method} | {name} | {same:.1f} % "
                        f"| {middle:.1e}, {most:.1e} | ≥ {least:.0f} %: {met} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

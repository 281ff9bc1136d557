"""The shipped model in each precision against float32 PyTorch, on real images.

python benchmarks/precision.py IMAGES CALIBRATION

IMAGES: a folder of test images, of which 1,000 are taken, spread over its sub-folders. CALIBRATION:
other images, for int8. Prints a Markdown table.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import machine

from tocom_export.bundle.writing import write_bundle
from tocom_export.cli.resolve import plan_build
from tocom_export.engines.onnx.calibration import input_scales
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.model.preprocess import find_images
from tocom_export.training.evaluate import runner
from tocom_export.training.lora import TrainableBank
from tocom_export.training.torch_engine import load_model

IMAGES, CALIBRATION = 1_000, 512
TARGETS = (0, 4, 8, 16)
LEAST = {"fp16": 99.0, "bf16": 99.0, "int8": 97.0}


def spread(folder: Path, count: int) -> list[Path]:
    """So many of the images in a folder, evenly over it."""
    files = find_images(folder)
    return [files[i] for i in np.linspace(0, len(files) - 1, count).astype(int)]


def main(images: Path, calibration: Path) -> None:
    """Build, run and compare."""
    print(f"\n{datetime.date.today()}, {machine()}\n")
    print("| precision | method | degree | same top-1 | median and 99 % of max \\|Δ\\| | bar |")
    print("|---|---|---:|---:|---:|---|")
    for method in ("tome", "evit"):
        plan = plan_build(
            model=None, checkpoint_file=None, bank_name=None, method_name=method, source=None,
            targets=TARGETS, scale=0.1,
        )  # fmt: skip
        size = plan.spec.image_size
        batch = plan.preprocess.load_batch(spread(images, IMAGES), size)
        known = plan.preprocess.load_batch(spread(calibration, CALIBRATION), size)
        assert plan.bank is not None
        model = load_model(plan.spec, plan.checkpoint.tensors, plan.method)
        steps = TrainableBank.from_bank(plan.bank, plan.spec)
        parts = range(0, IMAGES, 100)

        def wanted(target: int) -> np.ndarray:
            run = runner(model, target, steps.side(0, target, plan.scale))  # noqa: B023
            return np.concatenate([run(batch[i : i + 100]) for i in parts])  # noqa: B023

        logits = {target: wanted(target) for target in TARGETS}
        for precision, least in LEAST.items():
            with tempfile.TemporaryDirectory() as folder:
                typed = plan_build(
                    model=None, checkpoint_file=None, bank_name=None, method_name=method,
                    source=None, targets=TARGETS, scale=0.1, precision=precision,  # type: ignore[arg-type]
                )  # fmt: skip
                bundle = write_bundle(
                    typed,
                    Path(folder) / "bundle",
                    calibrate=lambda b, t: input_scales(b, t, known),  # noqa: B023
                )
                for target in TARGETS:
                    engine = OnnxEngine(bundle, target)
                    found = np.concatenate([engine.run(batch[i : i + 100]) for i in parts])
                    same = 100 * (found.argmax(1) == logits[target].argmax(1)).mean()
                    delta = np.abs(found - logits[target]).max(axis=1)
                    middle, most = np.quantile(delta, (0.5, 0.99))
                    met = "met" if same >= least else "**missed**"
                    print(
                        f"| {precision} | {method} | {target} | {same:.1f} % "
                        f"| {middle:.1e}, {most:.1e} | ≥ {least:.0f} %: {met} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

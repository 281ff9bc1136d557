"""How long it takes to write graphs and whole bundles of DeiT-B, and how large they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from unittest.mock import patch

import onnx_ir as ir
import torch
from common import Row, bank, checkpoint
from torch import Tensor, nn

from tocom_export.compression.method import Method
from tocom_export.compression.schedule import TokenSchedule
from tocom_export.graph.writer import write_graph
from tocom_export.io.tensors import read_header
from tocom_export.training.model import CompressedVit
from tocom_export.training.timm_models import spec_of_name, vit_from_spec

MODEL, TARGETS = "deit_base_patch16_224", (4, 8, 12, 16)


class AtDegree(nn.Module):
    """The compressed model at one fixed degree, as an exporter wants it."""

    def __init__(self, model: CompressedVit, degree: int) -> None:
        super().__init__()
        self.model, self.degree = model, degree

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.model(images, self.degree)


def write_seconds(folder: Path) -> float:
    """Writing the four graphs, weights lying ready: median of five."""
    spec = spec_of_name(MODEL)
    weights, _ = read_header(checkpoint(MODEL, folder))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for target in TARGETS:
            model = write_graph(spec, TokenSchedule.of(spec, target), Method("tome"), weights, {})
            ir.save(model, folder / f"r{target:02d}.onnx")
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def unstable_argsort(scores: Tensor, dim: int, descending: bool, stable: bool) -> Tensor:
    """What the exporter can convert; it has no stable sort."""
    return scores.sort(dim=dim, descending=descending).indices


def torch_export(target: int, file: Path) -> float:
    """Seconds of ``torch.onnx.export(dynamo=True)`` of one degree, once, the model at hand."""
    model = CompressedVit(vit_from_spec(spec_of_name(MODEL)), name=MODEL).eval()
    images = torch.randn(2, 3, 224, 224)
    start = time.perf_counter()
    with warnings.catch_warnings(), patch.object(Tensor, "argsort", unstable_argsort):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            AtDegree(model, target),
            (images,),
            file,
            dynamo=True,
            opset_version=18,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=True,
            verbose=False,
        )
    return time.perf_counter() - start


def build_and_copy(folder: Path) -> tuple[float, float, float]:
    """Seconds of ``build --no-verify``, seconds to copy its files, size over the checkpoint's.

    Five rounds, building and copying in turn, each with nothing left to be written to the disk;
    medians.
    """
    weights, factors = checkpoint(MODEL, folder), bank(MODEL, folder)
    out, copied = folder / "bundle", folder / "copy"
    builds, copies = [], []
    for _ in range(5):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(copied, ignore_errors=True)
        os.sync()
        start = time.perf_counter()
        subprocess.run(
            ["tocom-export", "build", "--model", MODEL, "--checkpoint", weights, "--bank", factors,
             "--out", out, "--no-verify", "--quiet"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        builds.append(time.perf_counter() - start)
        os.sync()
        start = time.perf_counter()
        shutil.copytree(out, copied)
        copies.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in out.iterdir())
    return median(builds), median(copies), size / weights.stat().st_size


def measure() -> list[Row]:
    """All of it, in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = write_seconds(folder)
        build, copy, ratio = build_and_copy(folder)
        theirs = sum(torch_export(t, folder / f"torch-r{t:02d}.onnx") for t in TARGETS)
    return [
        (
            "writing the graphs of DeiT-B at 4, 8, 12, 16, against torch.onnx.export(dynamo=True)",
            f"{ours:.2f} s against {theirs:.0f} s: {theirs / ours:.0f}×",
            "≥ 100×",
        ),
        (
            "whole `build --no-verify` of DeiT-B, four targets, over copying its files",
            f"{build:.2f} s over {copy:.2f} s: {build / copy:.2f}×",
            "≤ 3×",
        ),
        ("bundle of four targets, DeiT-B fp32, over the checkpoint", f"{ratio:.2f}×", "≤ 2.1×"),
    ]

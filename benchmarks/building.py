"""How long it takes to write graphs and whole bundles of DeiT-B, and how large they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import onnx
import onnx_ir as ir
import torch
from common import Row, make_bank, make_checkpoint
from torch import Tensor, nn

from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule
from tocom_export.graph.writer import write_graph
from tocom_export.io.tensors import read_header
from tocom_export.training.building import vit_from_spec
from tocom_export.training.model import CompressedVit
from tocom_export.training.timm_models import spec_of_name

MODEL, TARGETS = "deit_base_patch16_224", (0, 4, 8, 12, 16)


class AtDegree(nn.Module):
    """The compressed model at one fixed degree, as an exporter wants it."""

    def __init__(self, model: CompressedVit, degree: int) -> None:
        super().__init__()
        self.model, self.degree = model, degree

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.model(images, self.degree)


def time_writing(folder: Path) -> float:
    """Seconds to write all graphs, weights lying ready: median of five."""
    spec = spec_of_name(MODEL)
    weights, _ = read_header(make_checkpoint(MODEL, folder))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for degree in TARGETS:
            model = write_graph(spec, Schedule.of(spec, degree), Method("tome"), weights, {})
            ir.save(model, folder / f"r{degree:02d}.onnx")
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def sort_unstably(scores: Tensor, dim: int, descending: bool, stable: bool) -> Tensor:
    """What the exporter can convert; it has no stable sort."""
    return scores.sort(dim=dim, descending=descending).indices


def time_torch_export(degree: int, file: Path) -> float:
    """Seconds of ``torch.onnx.export(dynamo=True)`` of one degree, once, the model at hand."""
    model = CompressedVit(vit_from_spec(spec_of_name(MODEL)), name=MODEL).eval()
    images = torch.randn(2, 3, 224, 224)
    start = time.perf_counter()
    with warnings.catch_warnings(), patch.object(Tensor, "argsort", sort_unstably):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            AtDegree(model, degree),
            (images,),
            file,
            dynamo=True,
            opset_version=18,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=True,
            verbose=False,
        )
    return time.perf_counter() - start


def count_nodes(file: Path) -> tuple[list[int], int]:
    """Nodes of each merging step of one of our graphs, and of all of a graph.

    Those of others don't say which step they are of.
    """
    names = [node.name for node in onnx.load(file, load_external_data=False).graph.node]
    scopes = Counter(name.rpartition("/")[0] for name in names)
    return [count for scope, count in scopes.items() if scope.endswith(".tome")], len(names)


def format_span(numbers: Iterable[int]) -> str:
    """``28``, or ``26 to 28``."""
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def build_and_copy(folder: Path) -> tuple[float, float, float]:
    """Seconds of ``build --no-verify``, seconds to copy its files, size over the checkpoint's.

    Five rounds, building and copying in turn, each with nothing left to be written to the disk;
    medians.
    """
    weights, factors = make_checkpoint(MODEL, folder), make_bank(MODEL, folder)
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
        ours = time_writing(folder)
        steps, nodes = count_nodes(folder / "r16.onnx")
        build, copy, ratio = build_and_copy(folder)
        files = {degree: folder / f"torch-r{degree:02d}.onnx" for degree in TARGETS}
        theirs = sum(time_torch_export(degree, file) for degree, file in files.items())
        _, their_nodes = count_nodes(files[16])
    return [
        (
            f"writing all {len(TARGETS)} graphs of DeiT-B (r = {', '.join(map(str, TARGETS))}), "
            "against torch.onnx.export(dynamo=True)",
            f"{ours:.2f} s against {theirs:.0f} s: {theirs / ours:.0f}×",
            "≥ 100×",
        ),
        (
            "nodes of a merging step, matching included; of the whole graph of DeiT-B at r = 16, "
            "against torch.onnx.export(dynamo=True)",
            f"{format_span(steps)}; {nodes} against {their_nodes}",
            "≤ 30",
        ),
        (
            "whole `build --no-verify` of DeiT-B, r00 and four more, over copying its files",
            f"{build:.2f} s over {copy:.2f} s: {build / copy:.2f}×",
            "≤ 3×",
        ),
        (
            "bundle of r00 and four more, DeiT-B fp32, over the checkpoint",
            f"{ratio:.2f}×",
            "≤ 2.1×",
        ),
    ]

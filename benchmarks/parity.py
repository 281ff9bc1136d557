"""Engines against the PyTorch model in fp32, over models, methods and schedules."""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from common import Row, make_bank, make_checkpoint
from safetensors.numpy import save_file
from torch import Tensor

from tocom_export.bundle.weights import ModelWeights
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.engines.verify import Run, sample_images
from tocom_export.graph.writer import write_graph
from tocom_export.io.tensors import read_header
from tocom_export.training.lora import TrainableBank
from tocom_export.training.matching import Matching, match
from tocom_export.training.model import CompressedVit, SidePaths
from tocom_export.training.pruning import prune
from tocom_export.training.timm_models import spec_of_name
from tocom_export.training.torch_engine import load_model, make_runner
from tocom_export.variant import Variant

MODELS = {
    "deit_tiny_patch16_224": range(17),
    "deit_tiny_distilled_patch16_224": range(17),
    "deit_small_patch16_224": (0, 4, 8, 12, 16),
    "deit_base_patch16_224": (0, 4, 8, 12, 16),
    "deit_base_patch16_384": (0, 8, 16),
}
METHODS = (Method("tome"), Method("tome", proportional=False), Method("evit"))
SOURCES = (0, 16)
"""That a falling schedule is compensated from."""
BATCHES = (1, 8)
TOLERANCE = 1e-4
TIE = 5e-7
"""Similarities closer than this are equal to float32."""


@dataclass(frozen=True)
class Case:
    """One variant of a model with one method: its engine, and what it is held against."""

    variant: Variant
    method: Method
    run: Run
    model: CompressedVit
    bank: TrainableBank

    def side(self, bank: TrainableBank) -> SidePaths | None:
        """The bank's paths beside the weights; None where nothing is compensated."""
        variant = self.variant
        return bank.side(variant.source, variant.targets, variant.scale) if variant.baked else None

    def __str__(self) -> str:
        compensated = f" from {self.variant.source}" if self.variant.baked else ""
        return f"{self.model.spec.model} {self.method} {self.variant.label}{compensated}"


@dataclass
class Found:
    """What was seen of all cases so far."""

    cases: int = 0
    images: int = 0
    other_class: int = 0
    """Images with another top-1."""
    worst: float = 0.0
    """Largest |Δ| over the largest logit, ties apart."""
    ties: list[tuple[float, float]] = field(default_factory=list)
    """Of images with a tie, the same, and how close it is."""


def list_variants(model: str, degrees: Iterable[int], method: Method) -> Iterator[Variant]:
    """Those of a model, uncompensated; and with another degree in each layer, also compensated."""
    spec = spec_of_name(model)
    few = method == Method("tome", proportional=False)
    for degree in (8, 16) if few else degrees:
        yield Variant.of(spec, degree, compensated=False)
    if few:
        return
    mixed = [(3 * layer) % 17 for layer in range(spec.depth)]
    yield Variant.of(spec, mixed, "mixed", compensated=False)
    falling = [20 - 20 * layer // (spec.depth - 1) for layer in range(spec.depth)]
    for source in SOURCES:
        yield Variant.of(spec, falling, f"falling-{source}", source=source)


def open_cases(model: str, degrees: Iterable[int], folder: Path) -> Iterator[Case]:
    """Write each engine, and open it in ONNX Runtime."""
    spec = spec_of_name(model)
    file, bank = make_checkpoint(model, folder), ToComBank.load(make_bank(model, folder))
    checkpoint = Checkpoint.open(file)
    shared, _ = read_header(file)
    trainable = TrainableBank.from_bank(bank, spec)
    for method in METHODS:
        weights = ModelWeights(spec, checkpoint, dataclasses.replace(bank, method=method))
        vit = load_model(spec, checkpoint.tensors, method)
        for variant in list_variants(model, degrees, method):
            stored = dict(shared)
            if variant.baked:
                save_file(weights.own(variant), folder / "own.safetensors")
                stored |= read_header(folder / "own.safetensors")[0]
            graph = write_graph(spec, variant.schedule(spec), method, stored, {})
            ir.save(graph, folder / "graph.onnx")
            session = onnxruntime.InferenceSession(
                str(folder / "graph.onnx"), providers=["CPUExecutionProvider"]
            )
            run = lambda images, s=session: s.run(None, {"images": images})[0]  # noqa: E731
            yield Case(variant, method, run, vit, trainable)


@torch.inference_mode()
def measure_margin(case: Case, images: Tensor) -> float:
    """How close one image's merges, or what is pruned, come to a tie, in float64.

    The smallest difference between two similarities, or two shares of the class token's attention,
    of which one decides. Float32 knows a similarity to about 1e-7: below that, two runtimes may
    merge different tokens.
    """
    smallest = [math.inf]

    def watch(metric: Tensor, remove: int, prefix: int) -> Matching:
        unit = metric / metric.norm(dim=-1, keepdim=True)
        first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
        scores = unit[:, first_a::2] @ unit[:, first_b::2].transpose(1, 2)
        two = scores.topk(2, dim=-1).values
        best = two[..., 0].sort(dim=1, descending=True).values
        smallest.append(float((two[..., 0] - two[..., 1]).min()))
        if remove < best.shape[1]:
            smallest.append(float((best[:, remove - 1] - best[:, remove]).min()))
        return match(metric, remove, prefix)

    def watch_pruning(x: Tensor, scores: Tensor, remove: int, prefix: int) -> tuple[Tensor, Tensor]:
        ranked = scores[:, prefix:].sort(dim=1).values
        if remove < ranked.shape[1]:
            smallest.append(float((ranked[:, remove] - ranked[:, remove - 1]).min()))
        return prune(x, scores, remove, prefix)

    model, bank = copy.deepcopy(case.model).double(), copy.deepcopy(case.bank).double()
    with (
        patch.object(CompressedVit, "match", staticmethod(watch)),
        patch("tocom_export.training.model.prune", watch_pruning),
    ):
        model(images.double(), case.variant.degrees, case.side(bank))
    return min(smallest)


def compare(case: Case, batch: int, found: Found) -> None:
    """One batch in both; what is beyond the tolerance is looked at for a tie."""
    images = sample_images(case.model.spec, batch, seed=batch)
    got = case.run(images)
    wanted = make_runner(case.model, case.variant.degrees, case.side(case.bank))(images)
    relative = np.abs(got - wanted).max(axis=1) / np.abs(wanted).max()
    found.other_class += int((got.argmax(1) != wanted.argmax(1)).sum())
    found.cases, found.images = found.cases + 1, found.images + batch
    for image in np.flatnonzero(relative > TOLERANCE):
        close = measure_margin(case, torch.from_numpy(images[[image]]))
        print(f"{case}: {relative[image]:.1e}, tie {close:.1e}")
        if close < TIE:
            found.ties.append((float(relative[image]), close))
            relative[image] = 0
    found.worst = max(found.worst, float(relative.max()))


def measure() -> list[Row]:
    """The worst relative difference, ties apart, and whether every top-1 is the same."""
    found = Found()
    with tempfile.TemporaryDirectory() as name:
        for model, degrees in MODELS.items():
            for case in open_cases(model, degrees, Path(name)):
                for batch in BATCHES:
                    compare(case, batch, found)
            print(
                f"{model}: {found.cases} cases, {found.images} images so far, "
                f"{found.worst:.1e} at worst"
            )
    outcome = (
        f"max |Δ| {found.worst:.1e} × max |logit|; top-1 differs on {found.other_class} of "
        f"{found.images} images"
    )
    if found.ties:
        largest, closest = (max(values) for values in zip(*found.ties, strict=True))
        outcome += (
            f"; apart from {len(found.ties)} images with a tie (two similarities within "
            f"{closest:.0e} in float64): {largest:.1e}"
        )
    what = (
        f"engine against PyTorch, fp32, {found.cases} combinations of model, method, schedule, "
        "compensation, batch"
    )
    return [(what, outcome, "≤ 1e-4, top-1 equal")]

"""Engines against the PyTorch model in fp32, over models, methods and schedules."""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from common import Row, checkpoint
from safetensors.torch import load_file
from torch import Tensor

from tocom_export.compression.method import Method
from tocom_export.compression.schedule import TokenSchedule
from tocom_export.engines.verify import sample_images
from tocom_export.graph.writer import write_graph
from tocom_export.io.tensors import read_header
from tocom_export.training.matching import match
from tocom_export.training.model import CompressedVit
from tocom_export.training.timm_models import spec_of_name, vit_from_spec

MODELS = {
    "deit_tiny_patch16_224": range(17),
    "deit_tiny_distilled_patch16_224": range(17),
    "deit_small_patch16_224": (0, 4, 8, 12, 16),
    "deit_base_patch16_224": (0, 4, 8, 12, 16),
    "deit_base_patch16_384": (0, 8, 16),
}
METHODS = (Method("tome"), Method("tome", proportional=False), Method("evit"))
BATCHES = (1, 8)
TOLERANCE = 1e-4
TIE = 5e-7
"""Similarities closer than this are equal to float32."""


@torch.inference_mode()
def margin(model: CompressedVit, images: Tensor, degree: int | tuple[int, ...]) -> float:
    """How close one image's merges come to a tie, in float64.

    The smallest difference between two similarities of which one decides a merge. Float32 knows a
    similarity to about 1e-7: below that, two runtimes may merge different tokens.
    """
    smallest = [math.inf]

    def watched(metric: Tensor, remove: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
        unit = metric / metric.norm(dim=-1, keepdim=True)
        first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
        scores = unit[:, first_a::2] @ unit[:, first_b::2].transpose(1, 2)
        two = scores.topk(2, dim=-1).values
        best = two[..., 0].sort(dim=1, descending=True).values
        smallest.append(float((two[..., 0] - two[..., 1]).min()))
        if remove < best.shape[1]:
            smallest.append(float((best[:, remove - 1] - best[:, remove]).min()))
        return match(metric, remove, prefix)

    with patch("tocom_export.training.matching.match", watched):
        copy.deepcopy(model).double()(images.double(), degree)
    return min(smallest)


def measure() -> list[Row]:
    """The worst relative difference, ties apart, and whether every top-1 is the same."""
    worst, cases, count, other_class = 0.0, 0, 0, 0
    ties: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, degrees in MODELS.items():
            spec = spec_of_name(model)
            file = checkpoint(model, folder)
            weights, _ = read_header(file)
            vit = vit_from_spec(spec)
            vit.load_state_dict(load_file(file))
            lists = [tuple((3 * layer) % 17 for layer in range(spec.depth))]
            for method, degree in itertools.product(METHODS, [*degrees, *lists]):
                if method == Method("tome", proportional=False) and degree not in (8, 16):
                    continue
                graph = write_graph(spec, TokenSchedule.of(spec, degree), method, weights, {})
                ir.save(graph, folder / "graph.onnx")
                session = onnxruntime.InferenceSession(
                    str(folder / "graph.onnx"), providers=["CPUExecutionProvider"]
                )
                compressed = CompressedVit(vit, method, model).eval()
                for batch in BATCHES:
                    images = sample_images(spec, batch, seed=batch)
                    got = session.run(None, {"images": images})[0]
                    with torch.inference_mode():
                        wanted = compressed(torch.from_numpy(images), degree).numpy()
                    relative = np.abs(got - wanted).max(axis=1) / np.abs(wanted).max()
                    other_class += int((got.argmax(1) != wanted.argmax(1)).sum())
                    cases, count = cases + 1, count + batch
                    for image in np.flatnonzero(relative > TOLERANCE):
                        close = margin(compressed, torch.from_numpy(images[[image]]), degree)
                        print(f"{model} {method} {degree}: {relative[image]:.1e}, tie {close:.1e}")
                        if close < TIE:
                            ties.append((float(relative[image]), close))
                            relative[image] = 0
                    worst = max(worst, float(relative.max()))
            print(f"{model}: {cases} cases, {count} images so far, {worst:.1e} at worst")
    outcome = f"max |Δ| {worst:.1e} × max |logit|; top-1 differs on {other_class} of {count} images"
    if ties:
        outcome += (
            f"; apart from {len(ties)} images with a tie (two similarities within "
            f"{max(close for _, close in ties):.0e} in float64): {max(d for d, _ in ties):.1e}"
        )
    what = f"engine against PyTorch, fp32, {cases} combinations of model, method, degree, batch"
    return [(what, outcome, "≤ 1e-4, top-1 equal")]

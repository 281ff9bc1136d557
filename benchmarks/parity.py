"""Engines against the PyTorch model in fp32, over models, methods and schedules."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from common import Row, checkpoint

from tocom_export.engines.compare import sample_images
from tocom_export.graph.writer import write_graph
from tocom_export.method import Method
from tocom_export.schedule import TokenSchedule
from tocom_export.store import read_header
from tocom_export.training.model import CompressedVit
from tocom_export.training.zoo import spec_of_name, vit_from_spec

MODELS = {
    "deit_tiny_patch16_224": range(17),
    "deit_tiny_distilled_patch16_224": range(17),
    "deit_small_patch16_224": (0, 4, 8, 12, 16),
    "deit_base_patch16_224": (0, 4, 8, 12, 16),
    "deit_base_patch16_384": (0, 8, 16),
}
METHODS = (Method("tome"), Method("tome", proportional=False), Method("evit"))
BATCHES = (1, 8)


def measure() -> list[Row]:
    """The worst relative difference, and whether every top-1 is the same."""
    worst, cases, images_differ = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, degrees in MODELS.items():
            spec = spec_of_name(model)
            file = checkpoint(model, folder)
            weights, _ = read_header(file)
            vit = vit_from_spec(spec)
            from safetensors.torch import load_file

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
                    relative = float(np.abs(got - wanted).max() / np.abs(wanted).max())
                    worst = max(worst, relative)
                    images_differ += int((got.argmax(1) != wanted.argmax(1)).sum())
                    cases += 1
                    if relative > 1e-4:
                        print(f"{model} {method} degree {degree} batch {batch}: {relative:.1e}")
            print(f"{model}: worst so far {worst:.1e} over {cases} cases")
    return [
        (
            f"engine against PyTorch, fp32, {cases} combinations of model, method, degree, batch",
            f"max |Δ| {worst:.1e} × max |logit|; top-1 differs on {images_differ} images",
            "≤ 1e-4, top-1 equal",
        )
    ]

"""What ``gpu_check.py`` checks and times beside plans: a bundle, ONNX Runtime, PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpu_report import GPU, HOST, TORCH, Report, Runs, Skip

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.compression.method import Method
from tocom_export.engines.engine import Images, Logits
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.verify import compare, sample_images
from tocom_export.loading import is_installed
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant

TARGETS, SOURCE, SCALE = (0, 4, 8, 12, 16), 0, 0.1
FAST = "fast"
"""The variant with another degree in each layer."""


def make_model(spec: VitSpec) -> tuple[Checkpoint, ToComBank]:
    """Weights and a bank in which no two tensors are alike."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in spec.weights().items():
        values = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            values *= np.float32(0.5 if "token" in name or "pos" in name else shape[-1] ** -0.5)
        else:
            values = values * np.float32(0.1) + np.float32(name.endswith((".weight", "gamma")))
        tensors[name] = values.astype(np.float32)
    down, up = (spec.depth, 16, 2, spec.width), (spec.depth, 16, spec.width, 2)
    factors = [(rng.standard_normal(s) * 0.05).astype(np.float32) for s in (down, up) * 2]
    bank = ToComBank(*factors, method=Method("tome"), model=spec.model)
    return Checkpoint(Path("random"), tensors, ModelInfo()), bank


def make_variants(spec: VitSpec) -> dict[str, Variant]:
    """One of each target, and one whose degrees fall from 16 to 0."""
    falling = [16 - 16 * layer // (spec.depth - 1) for layer in range(spec.depth)]
    named: list[tuple[str | None, Any]] = [*((None, t) for t in TARGETS), (FAST, falling)]
    found = [Variant.of(spec, degrees, name, source=SOURCE, scale=SCALE) for name, degrees in named]
    return {variant.name: variant for variant in found}


def build_bundle(spec: VitSpec, precision: Any, folder: Path) -> tuple[Bundle, Blueprint]:
    """A bundle of all variants."""
    weights = ModelWeights(spec, *make_model(spec), precision)
    blueprint = Blueprint(weights, Method("tome"), make_variants(spec), Preprocess())
    return write_bundle(blueprint, folder / precision), blueprint


def judge(
    run: Callable[[Images], Logits], bundle: Bundle, variant: Variant, images: Images
) -> dict[str, Any]:
    """An engine against PyTorch on the CPU.

    Raises:
        AssertionError: it says something else.
    """
    if not is_installed("timm"):
        return {"compared": "timm is not installed"}
    from tocom_export.training.torch_engine import make_oracle

    oracle = partial(make_oracle(bundle), variant)
    found = compare(
        run, images, oracle, variant.name, variant.name, bundle.precision, batch=len(images)
    )
    if not found.passed:
        raise AssertionError(
            f"{found.beyond} of {found.images} images differ, by {found.max_difference:.1e} at most"
        )
    return {"max_difference": found.max_difference, "images_beyond": found.beyond}


def need_torch() -> None:
    """Raise Skip where PyTorch can't be timed."""
    if not is_installed("torch", "timm"):
        raise Skip("torch or timm is not installed")
    import torch

    if not torch.cuda.is_available():
        raise Skip("torch has no GPU")


def make_torch_runs(
    bundle: Bundle, blueprint: Blueprint, batch: int, device: str, compiled: bool = False
) -> Runs:
    """One run of a batch in half precision, waiting for its end."""
    import torch

    from tocom_export.training.scatter_merge import ScatterMergeVit
    from tocom_export.training.torch_engine import load_model

    images = torch.from_numpy(sample_images(bundle.spec, batch))
    if device == "cuda":
        images = images.pin_memory()  # as TensorRT's buffers on the host are
    resident = images.to(device).half()
    method, tensors = blueprint.method, blueprint.weights.checkpoint.tensors
    model = load_model(bundle.spec, tensors, method).to(device).half()
    models: dict[str, Any] = {
        TORCH: model,
        "torch eager, merging by scatter": ScatterMergeVit(
            model.vit, method, bundle.spec.model
        ).eval(),
    }
    if compiled:
        torch.compiler.reset()
        models = {"torch.compile": torch.compile(model)}

    @torch.inference_mode()
    def run(network: Any, variant: Variant, copies: str) -> Any:
        given = images.to(device, non_blocking=True).half() if copies == HOST else resident
        logits = network(given, variant.degrees)
        if copies == HOST:
            return logits.float().cpu()
        if device == "cuda":
            torch.cuda.synchronize()
        return None

    return {
        (backend, variant.name, copies): partial(run, network, variant, copies)
        for variant in bundle.variants.values()
        for copies in (HOST, GPU)
        for backend, network in models.items()
    }


def open_onnx_engines(bundle: Bundle, report: Report) -> dict[str, OnnxEngine]:
    """Variant → its engine in ONNX Runtime on CUDA, compared with PyTorch."""
    engines: dict[str, OnnxEngine] = {}
    for name, variant in bundle.variants.items():
        with report.step(f"onnx, CUDA: {name} compared with PyTorch") as entry:
            report.need(5)
            if not is_installed("onnxruntime"):
                raise Skip("onnxruntime is not installed")
            import onnxruntime

            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise Skip("this ONNX Runtime has no CUDA; onnxruntime-gpu has")
            engine = OnnxEngine(bundle, variant, device="cuda")
            entry |= judge(engine.run, bundle, variant, sample_images(bundle.spec, 32))
            engines[name] = engine
    return engines

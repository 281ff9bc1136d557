"""Images and weights that leave tokens without keys, or all alike, or as large as they get.

Every engine against the PyTorch model of its own weights, judged as ``verify`` judges: in fp32 no
image may differ, as ties go by position on both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.method import Method
from tocom_export.engines.onnx.calibration import measure_input_scales
from tocom_export.engines.verify import sample_images, verify
from tocom_export.errors import CheckpointError
from tocom_export.graph.precision import Precision
from tocom_export.io.tensors import Tensors
from tocom_export.model.spec import VitSpec
from tocom_export.training.torch_engine import make_oracle

Array = np.ndarray
WEIGHTS = ("plain", "keyless black", "dead keys", "dead", "huge keys")
IMAGES = ("zero", "constant", "a black patch", "half black", "large")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")


def change_images(kind: str, images: Array, precision: Precision = "fp32") -> Array:
    """Images (B, C, H, W) of a kind; large ones are what LayerNorm's squares, or fp16, can hold."""
    images = images.copy()
    if kind == "zero":
        images[:] = 0
    elif kind == "constant":
        images[:] = np.linspace(-3, 3, len(images))[:, None, None, None]
    elif kind == "a black patch":
        images[:, :, :8, 16:24] = 0  # with two prefix tokens at position 4, of set A
        images[:, :, :8, 24:32] = 0  # and 5, of set B
    elif kind == "half black":
        images[..., images.shape[-1] // 2 :] = 0
    elif kind == "large":
        images *= np.float32(1e3 if precision == "fp16" else 1e17)
    return images


def change_weights(kind: str, tensors: Tensors, spec: VitSpec) -> dict[str, Array]:
    changed = {name: tensor.copy() for name, tensor in tensors.items()}
    rows = {part: slice(i * spec.width, (i + 1) * spec.width) for i, part in enumerate("qkv")}

    def scale(layer: int, part: str, by: float) -> None:
        for name in ("weight", "bias"):
            changed[f"blocks.{layer}.attn.qkv.{name}"][rows[part]] *= np.float32(by)

    if kind == "keyless black":  # a patch of zeros has a key of zeros
        first = ("norm1.bias", "attn.qkv.bias")
        for name in ("pos_embed", "patch_embed.proj.bias", *(f"blocks.0.{part}" for part in first)):
            changed[name][:] = 0
    elif kind == "dead keys":
        scale(1, "k", 0)
    elif kind == "dead":
        for tensor in changed.values():
            tensor[:] = 0
    elif kind == "huge keys":  # and queries so small that attention stays what it was
        scale(1, "k", 1e30)
        scale(1, "q", 1e-30)
    return changed


def build(blueprint: Blueprint, kind: str, method: Any, precision: Precision, out: Any) -> Bundle:
    weights = blueprint.weights
    tensors = change_weights(kind, weights.checkpoint.tensors, weights.spec)
    checkpoint = dataclasses.replace(weights.checkpoint, tensors=tensors)
    weights = dataclasses.replace(weights, checkpoint=checkpoint, precision=precision)
    images = sample_images(weights.spec, 16, seed=1)
    images = np.concatenate([images, *(change_images(kind, images) for kind in IMAGES)])
    return write_bundle(
        dataclasses.replace(blueprint, weights=weights, method=Method(method)),
        out,
        calibrate=lambda bundle, variant: measure_input_scales(bundle, variant.name, images),
    )


@pytest.fixture(scope="module")
def distilled(
    tmp_path_factory: pytest.TempPathFactory,
    make_blueprint: Callable[..., Blueprint],
    make_spec: Callable[..., VitSpec],
) -> Blueprint:
    """r08 of a model with two prefix tokens."""
    folder, spec = tmp_path_factory.mktemp("blueprint"), make_spec(depth=3, distilled=True)
    return make_blueprint(folder, spec, bank=None, targets=(8,))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("method", ["tome", "evit"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_say_what_the_model_says(
    distilled: Blueprint, tmp_path: Any, kind: str, method: str, precision: Precision
):
    if (kind, precision) == ("huge keys", "fp16"):
        with pytest.raises(CheckpointError, match="beyond ±65504"):
            build(distilled, kind, method, precision, tmp_path / "bundle")
        return
    bundle = build(distilled, kind, method, precision, tmp_path / "bundle")
    oracle = make_oracle(bundle)
    images = sample_images(bundle.spec, 8)
    for backend, options in (("onnx", {}), ("openvino", {"inference_precision": "f32"})):
        if backend == "openvino":
            pytest.importorskip("openvino")
        for pictures in ("structured", *IMAGES):
            changed = change_images(pictures, images, precision)
            (found,) = verify(bundle, changed, oracle, backend=backend, threads=1, **options)
            assert found.finite, (backend, pictures)
            assert found.passed, (backend, pictures, found)


@pytest.mark.parametrize("method", ["tome", "evit"])
def test_images_whose_squares_overflow_pass_no_check(
    distilled: Blueprint, tmp_path: Any, method: str
):
    """LayerNorm then has no variance, which each side makes something else of."""
    bundle = build(distilled, "plain", method, "fp32", tmp_path / "bundle")
    images = sample_images(bundle.spec, 2) * np.float32(1e30)
    (found,) = verify(bundle, images, make_oracle(bundle), threads=1)
    assert not found.passed
    assert found.beyond == 2

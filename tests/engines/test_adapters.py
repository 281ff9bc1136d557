"""A model with adapters on its whole way: trained form, checkpoint, bundle, engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.compression.method import Method
from tocom_export.engines.verify import sample_images, verify
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.adaptformer import add_adapters, merge_adapter_scale
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit
from tocom_export.training.torch_engine import make_oracle
from tocom_export.variant import Variant

SOURCE, GAP_SCALE = 8, 0.1
VARIANTS = {"r00": 0, "r08": 8, "r16": 16, "fast": (20, 3, 0, 7)}


@pytest.fixture(params=["tome", "evit"])
def method(request: pytest.FixtureRequest) -> Method:
    return Method(request.param)


@pytest.fixture(params=[{}, {"distilled": True}, {"layer_scale": True}], ids=str)
def trained(
    request: pytest.FixtureRequest, method: Method, make_spec: Callable, make_vit: Callable
) -> CompressedVit:
    """What training leaves: the backbone's weights perturbed, adapters away from zero, a scale."""
    vit = make_vit(make_spec(**request.param))
    add_adapters(vit, scale=0.1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            deviation = 1.0 if "adapter_" in name else 0.02
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=deviation)
    return CompressedVit(vit, method, "small").eval()


@pytest.fixture
def bank(trained: CompressedVit, make_spec: Callable, make_bank: Callable) -> ToComBank:
    """One of the backbone without adapters."""
    plain: VitSpec = make_spec(distilled=trained.spec.distilled)
    bank: ToComBank = make_bank(plain, method=trained.method.name)
    bank.check(trained.spec, trained.method)
    return bank


@pytest.fixture
def bundle(trained: CompressedVit, bank: ToComBank, tmp_path: Path) -> Bundle:
    file = tmp_path / "checkpoint.safetensors"
    info = ModelInfo(trained.spec, SOURCE)
    save_file(merge_adapter_scale(trained.vit), file, to_metadata(info))
    checkpoint = Checkpoint.open(file)
    assert checkpoint.info.spec == trained.spec
    spec = checkpoint.check(checkpoint.info.spec)
    variants = {
        name: Variant.of(spec, degrees, name, source=SOURCE, scale=GAP_SCALE)
        for name, degrees in VARIANTS.items()
    }
    weights = ModelWeights(spec, checkpoint, bank)
    write_bundle(Blueprint(weights, trained.method, variants, Preprocess()), tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_engines_say_what_the_trained_model_says(
    trained: CompressedVit, bank: ToComBank, bundle: Bundle
):
    assert bundle.spec.adapter_width == 32
    paths = TrainableBank.from_bank(bank, trained.spec)

    @torch.inference_mode()
    def model(variant: Variant, images: Any) -> Any:
        side = paths.side(SOURCE, variant.targets, GAP_SCALE)
        return trained(torch.from_numpy(images), variant.degrees, side).numpy()

    images = sample_images(trained.spec)
    for oracle in (model, make_oracle(bundle), make_oracle(bundle, bank)):
        results = list(verify(bundle, images, oracle))
        assert [result.variant for result in results] == list(VARIANTS)
        assert [result for result in results if not result.passed] == []

    with torch.no_grad():
        for block in trained.vit.blocks:
            block.mlp.scale = 0.0
    for variant in bundle.variants.values():
        gone = np.abs(model(variant, images) - make_oracle(bundle)(variant, images)).max()
        assert gone > 1e-2  # the comparison would see a missing branch

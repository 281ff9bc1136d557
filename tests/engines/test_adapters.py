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
from tocom_export.bundle.writing import BuildPlan, write_bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.compression.method import Method
from tocom_export.engines.verify import compare, sample_images
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.adaptformer import add_adapters, merged_state
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit
from tocom_export.training.torch_engine import Reference

SOURCE, TARGETS, GAP_SCALE = 8, (0, 8, 16), 0.1


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
    save_file(merged_state(trained.vit), file, ModelInfo(trained.spec, SOURCE).to_metadata())
    checkpoint = Checkpoint.open(file)
    assert checkpoint.info.spec == trained.spec
    spec = checkpoint.fit(checkpoint.info.spec)
    plan = BuildPlan(
        spec, checkpoint, bank, trained.method, SOURCE, TARGETS, GAP_SCALE, Preprocess()
    )
    write_bundle(plan, tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")


def test_engines_say_what_the_trained_model_says(
    trained: CompressedVit, bank: ToComBank, bundle: Bundle
):
    assert bundle.spec.adapter_width == 32
    paths = TrainableBank.from_bank(bank, trained.spec)

    @torch.inference_mode()
    def model(target: int, images: Any) -> Any:
        side = paths.side(SOURCE, target, GAP_SCALE)
        return trained(torch.from_numpy(images), target, side).numpy()

    images = sample_images(trained.spec)
    for reference in (model, Reference(bundle), Reference(bundle, bank)):
        results = list(compare(bundle, images, reference))
        assert [result.target for result in results] == list(TARGETS)
        assert [result for result in results if not result.passed] == []

    with torch.no_grad():
        for block in trained.vit.blocks:
            block.mlp.scale = 0.0
    for target in TARGETS:
        gone = np.abs(model(target, images) - Reference(bundle)(target, images)).max()
        assert gone > 1e-2  # the comparison would see a missing branch

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import BuildPlan, write_bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.method import Method
from tocom_export.model.spec import VitSpec
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit
from tocom_export.training.timm_models import vit_from_spec
from tocom_export.training.torch_engine import Reference, load_model, load_weights

TARGETS = (0, 4, 8, 16)
SOURCE = 4


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(depth=2)


@pytest.fixture(scope="module")
def plan(
    tmp_path_factory: pytest.TempPathFactory, make_plan: Callable[..., BuildPlan], spec: VitSpec
) -> BuildPlan:
    return make_plan(tmp_path_factory.mktemp("plan"), spec, source=SOURCE, targets=TARGETS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, plan: BuildPlan) -> Bundle:
    return write_bundle(plan, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("with_bank", [True, False])
def test_logits_are_the_compensated_models(
    bundle: Bundle, plan: BuildPlan, make_vit: Callable, make_images: Callable,
    target: int, with_bank: bool,
):  # fmt: skip
    images = make_images(bundle.spec)
    side = TrainableBank.from_bank(plan.bank, bundle.spec).side(SOURCE, target, plan.scale)
    with torch.inference_mode():
        wanted = CompressedVit(make_vit(bundle.spec))(torch.from_numpy(images), target, side)
    got = Reference(bundle, plan.bank if with_bank else None)(target, images)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("with_bank", [True, False])
def test_one_target_leaves_nothing_behind_for_the_next(
    bundle: Bundle, plan: BuildPlan, make_images: Callable, with_bank: bool
):
    images = make_images(bundle.spec)
    bank = plan.bank if with_bank else None
    shared = Reference(bundle, bank)
    for target in (16, SOURCE, 0, 8):
        np.testing.assert_array_equal(
            shared(target, images), Reference(bundle, bank)(target, images)
        )


def test_a_wrongly_baked_bundle_is_seen_with_the_bank_alone(
    plan: BuildPlan, bundle: Bundle, tmp_path: Path, make_images: Callable
):
    louder = dataclasses.replace(plan, scale=0.3)
    wrong = dataclasses.replace(write_bundle(louder, tmp_path / "wrong"), scale=plan.scale)
    images = make_images(bundle.spec)
    right = Reference(bundle)(8, images)
    np.testing.assert_allclose(Reference(wrong, plan.bank)(8, images), right, atol=1e-5)
    assert np.abs(Reference(wrong)(8, images) - right).max() > 1e-2


def test_an_uncompensated_bundle(
    plan: BuildPlan, tmp_path: Path, make_vit: Callable, make_images: Callable
):
    plain = write_bundle(dataclasses.replace(plan, bank=None), tmp_path / "plain")
    images = make_images(plan.spec)
    with torch.inference_mode():
        wanted = CompressedVit(make_vit(plan.spec))(torch.from_numpy(images), 8)
    np.testing.assert_allclose(Reference(plain)(8, images), wanted.numpy(), atol=1e-6)


def test_the_bundles_method_is_used(
    plan: BuildPlan, bundle: Bundle, tmp_path: Path, make_bank: Callable, make_images: Callable
):
    bank: ToComBank = make_bank(plan.spec, method="evit")
    pruned = dataclasses.replace(plan, bank=bank, method=Method("evit"))
    reference = Reference(write_bundle(pruned, tmp_path / "pruned"), bank)
    images = make_images(plan.spec)
    assert np.abs(reference(8, images) - Reference(bundle)(8, images)).max() > 1e-2


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_loaded_as_float32(spec: VitSpec, make_weights: Callable, dtype: type):
    weights = {name: t.astype(dtype) for name, t in make_weights(spec).items()}
    model = load_model(spec, weights, Method("evit"))
    assert not model.training
    assert model.spec == spec
    assert model.method == Method("evit")
    for name, tensor in model.vit.state_dict().items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), weights[name].astype(np.float32))


def test_weights_that_are_not_given_stay(spec: VitSpec, make_weights: Callable):
    vit = vit_from_spec(spec)
    head = vit.head.weight.clone()
    weights = {n: t for n, t in make_weights(spec).items() if not n.startswith("head.")}
    load_weights(vit, weights)
    assert torch.equal(vit.head.weight, head)
    np.testing.assert_array_equal(vit.cls_token.detach().numpy(), weights["cls_token"])

"""The PyTorch model of a bundle, and what its engines are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.method import Method
from tocom_export.graph.precision import Precision
from tocom_export.model.spec import VitSpec
from tocom_export.preparing import prepare
from tocom_export.training.building import vit_from_spec
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit
from tocom_export.training.torch_engine import (
    BankOracle,
    Float32Oracle,
    StoredOracle,
    evaluate_model,
    load_model,
    load_weights,
    make_oracle,
    make_runner,
)

NAMES = ("r00", "r04", "r08", "r16", "fast")
SOURCE = 4


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(depth=3)


@pytest.fixture(scope="module")
def blueprint(
    tmp_path_factory: pytest.TempPathFactory,
    make_blueprint: Callable[..., Blueprint],
    spec: VitSpec,
) -> Blueprint:
    return make_blueprint(
        tmp_path_factory.mktemp("blueprint"), spec, source=SOURCE, targets=(0, 4, 8, 16),
        schedules={"fast": (20, 3, 0)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, blueprint: Blueprint) -> Bundle:
    return write_bundle(blueprint, tmp_path_factory.mktemp("bundles") / "bundle")


def compensate(blueprint: Blueprint, bank: ToComBank | None, **changes: Any) -> Blueprint:
    """The same with another bank, and other values of its variants."""
    variants = {
        name: dataclasses.replace(variant, compensated=bank is not None, **changes)
        for name, variant in blueprint.variants.items()
    }
    weights = dataclasses.replace(blueprint.weights, bank=bank)
    return dataclasses.replace(blueprint, weights=weights, variants=variants)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_bank", [True, False])
def test_logits_are_the_compensated_models(
    bundle: Bundle, blueprint: Blueprint, make_vit: Callable, make_images: Callable,
    name: str, with_bank: bool,
):  # fmt: skip
    images, variant, bank = make_images(bundle.spec), bundle.variant(name), blueprint.weights.bank
    paths = TrainableBank.from_bank(bank, bundle.spec)
    side = paths.side(SOURCE, variant.targets, variant.scale)
    assert (side is None) == (name == "r04")
    with torch.inference_mode():
        model = CompressedVit(make_vit(bundle.spec))
        wanted = model(torch.from_numpy(images), variant.degrees, side)
    got = make_oracle(bundle, bank if with_bank else None)(variant, images)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


def test_each_layer_of_a_schedule_has_its_own_target(bundle: Bundle):
    assert bundle.variant("fast").targets == (16, 16, 11.5)


def test_the_bank_decides_the_oracle(bundle: Bundle, blueprint: Blueprint):
    assert isinstance(make_oracle(bundle), StoredOracle)
    assert isinstance(make_oracle(bundle, blueprint.weights.bank), BankOracle)


@pytest.mark.parametrize("with_bank", [True, False])
def test_one_variant_leaves_nothing_behind_for_the_next(
    bundle: Bundle, blueprint: Blueprint, make_images: Callable, with_bank: bool
):
    images = make_images(bundle.spec)
    bank = blueprint.weights.bank if with_bank else None
    shared = make_oracle(bundle, bank)
    for name in ("r16", "r04", "fast", "r00", "r08", "fast"):
        variant = bundle.variant(name)
        np.testing.assert_array_equal(
            shared(variant, images), make_oracle(bundle, bank)(variant, images)
        )


@pytest.mark.parametrize("name", ["r08", "fast"])
def test_a_wrongly_baked_bundle_is_seen_with_the_bank_alone(
    blueprint: Blueprint, bundle: Bundle, tmp_path: Path, make_images: Callable, name: str
):
    bank, variant = blueprint.weights.bank, bundle.variant(name)
    wrong = write_bundle(compensate(blueprint, bank, scale=0.3), tmp_path / "wrong")
    images = make_images(bundle.spec)
    right = make_oracle(bundle)(variant, images)
    np.testing.assert_allclose(make_oracle(wrong, bank)(variant, images), right, atol=1e-5)
    assert np.abs(make_oracle(wrong)(variant, images) - right).max() > 1e-2


def test_an_uncompensated_bundle(
    blueprint: Blueprint, tmp_path: Path, make_vit: Callable, make_images: Callable
):
    plain = write_bundle(compensate(blueprint, None), tmp_path / "plain")
    images = make_images(plain.spec)
    for name in ("r08", "fast"):
        variant = plain.variant(name)
        with torch.inference_mode():
            model = CompressedVit(make_vit(plain.spec))
            wanted = model(torch.from_numpy(images), variant.degrees)
        for bank in (None, blueprint.weights.bank):  # which none of its variants asks for
            got = make_oracle(plain, bank)(variant, images)
            np.testing.assert_allclose(got, wanted.numpy(), atol=1e-6)


def test_the_bundles_method_is_used(
    blueprint: Blueprint, bundle: Bundle, tmp_path: Path, make_bank: Callable, make_images: Callable
):
    bank: ToComBank = make_bank(bundle.spec, method="evit")
    pruned = dataclasses.replace(compensate(blueprint, bank), method=Method("evit"))
    oracle = make_oracle(write_bundle(pruned, tmp_path / "pruned"), bank)
    images, variant = make_images(bundle.spec), bundle.variant(8)
    assert np.abs(oracle(variant, images) - make_oracle(bundle)(variant, images)).max() > 1e-2


def test_the_oracle_of_a_checkpoint_is_that_of_its_bundle(
    blueprint: Blueprint, bundle: Bundle, make_images: Callable
):
    weights, images = blueprint.weights, make_images(bundle.spec)
    tensors = weights.checkpoint.tensors
    model = load_model(bundle.spec, tensors, bundle.method)
    oracle, plain = BankOracle(model, weights.bank), BankOracle(model, None)
    for variant in bundle.variants.values():
        wanted = make_oracle(bundle, weights.bank)(variant, images)
        np.testing.assert_array_equal(oracle(variant, images), wanted)
        np.testing.assert_array_equal(oracle.runner(variant)(images), wanted)
        run = make_runner(plain.model, variant.degrees)
        np.testing.assert_array_equal(plain(variant, images), run(images))


def round_to(blueprint: Blueprint, precision: Precision) -> Blueprint:
    weights = dataclasses.replace(blueprint.weights, precision=precision)
    return dataclasses.replace(blueprint, weights=weights)


@pytest.mark.parametrize("method", ["tome", "evit"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_weights_that_the_packages_model_was_rounded_from(
    tmp_path: Path, make_images: Callable, method: str, precision: Precision
):
    blueprint = prepare(targets=(0, 12), method=method, precision=precision, scale=0.2)
    bundle = write_bundle(blueprint, tmp_path / "bundle")
    oracle, weights = Float32Oracle(bundle), blueprint.weights
    model = load_model(bundle.spec, weights.checkpoint.tensors, bundle.method)
    images = make_images(bundle.spec)
    for variant in bundle.variants.values():
        assert oracle.stored_as(variant) == "fp32"
        wanted = BankOracle(model, weights.bank)(variant, images)
        np.testing.assert_array_equal(oracle.runner(variant)(images), wanted)
        assert (StoredOracle(bundle)(variant, images) != wanted).any()


def test_weights_of_another_bank_are_taken_as_they_are(
    tmp_path: Path, make_bank: Callable, make_images: Callable
):
    """What is not compensated is known nevertheless."""
    spec = prepare(targets=(0,)).weights.spec
    blueprint = prepare(targets=(0, 8), bank=make_bank(spec), precision="bf16")
    bundle = write_bundle(blueprint, tmp_path / "bundle")
    oracle, images = Float32Oracle(bundle), make_images(spec)
    assert [oracle.stored_as(v) for v in bundle.variants.values()] == ["fp32", "bf16"]
    eight = bundle.variant(8)
    wanted = StoredOracle(bundle)(eight, images)
    np.testing.assert_array_equal(oracle.runner(eight)(images), wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_of_another_model_are_taken_as_they_are(
    blueprint: Blueprint, tmp_path: Path, make_images: Callable, precision: Precision
):
    bundle = write_bundle(round_to(blueprint, precision), tmp_path / "bundle")
    oracle, images = Float32Oracle(bundle), make_images(bundle.spec)
    for variant in bundle.variants.values():
        assert oracle.stored_as(variant) == precision
        wanted = StoredOracle(bundle)(variant, images)
        np.testing.assert_array_equal(oracle.runner(variant)(images), wanted)


def test_a_method_without_a_bank(tmp_path: Path):
    """The package's banks are of proportional attention."""
    options = {"proportional": False, "bank": "none", "precision": "bf16"}
    bundle = write_bundle(prepare(targets=(8,), **options), tmp_path / "bundle")
    assert Float32Oracle(bundle).stored_as(bundle.variant(8)) == "fp32"


def test_accuracy_of_a_model(spec: VitSpec, make_weights: Callable, make_images: Callable):
    model = load_model(spec, make_weights(spec), Method("tome"))
    images = make_images(spec, 8)
    for degrees in (0, 8, (20, 3, 0)):
        labels = make_runner(model, degrees)(images).argmax(axis=1)
        labels[:2] = (labels[:2] + 1) % spec.classes
        pairs = zip(
            torch.from_numpy(images).split(3), torch.from_numpy(labels).split(3), strict=True
        )
        assert evaluate_model(model, list(pairs), degrees) == 75


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

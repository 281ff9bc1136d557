"""The bank as low-rank paths beside the weights, while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tocom_export.compression.bake import bake
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.bank_groups import Arithmetic, groups_of
from tocom_export.compression.method import Method
from tocom_export.errors import BankError
from tocom_export.model.spec import VitSpec
from tocom_export.model.weight_names import qkv_weights
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit
from tocom_export.variant import Variant

ARITHMETICS = get_args(Arithmetic)

PAIRS = [(0, 1), (0, 16), (3, 9), (16, 0), (9, 8)]
FAST = (20, 3, 0)
"""In a model of three layers: targets 16, 16 and 11.5."""


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(depth=3)


@pytest.fixture
def tokens(spec: VitSpec) -> torch.Tensor:
    return torch.randn(2, 5, spec.width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bank(make_bank: Callable[..., ToComBank], spec: VitSpec) -> ToComBank:
    return make_bank(spec)


def test_an_untrained_bank_changes_nothing(spec: VitSpec, tokens: torch.Tensor):
    untrained = TrainableBank(spec, Method("tome"))
    assert untrained.down.abs().max() > 0
    for layer in range(spec.depth):
        for gain in untrained.side(0, 16)(layer, tokens):
            assert gain.shape == tokens.shape
            assert not gain.any()


def test_down_factors_start_as_a_linear_layer_does(spec: VitSpec):
    torch.manual_seed(0)
    down = TrainableBank(spec, Method("tome"), rank=8).down
    linear = torch.nn.Linear(spec.width, 10_000).weight
    assert down.abs().max() <= linear.abs().max() * 1.001
    torch.testing.assert_close(down.std(), linear.std(), rtol=0.02, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_number_of_parameters(spec: VitSpec, rank: int):
    trained = TrainableBank(spec, Method("tome"), rank=rank)
    expected = spec.depth * 2 * 16 * 2 * spec.width * rank
    assert sum(p.numel() for p in trained.parameters()) == expected
    assert trained.to_bank().parameters == expected


@pytest.mark.parametrize("source, target", PAIRS)
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_the_gain_is_the_banks_gap(
    bank: ToComBank, spec: VitSpec, tokens: torch.Tensor, source: int, target: int, scale: float
):
    side = TrainableBank.from_bank(bank, spec).side(source, target, scale)
    for layer in range(spec.depth):
        gaps = bank.gap(layer, source, target, scale)
        for gain, gap in zip(side(layer, tokens), gaps, strict=True):
            wanted = tokens.double() @ torch.from_numpy(gap).T
            torch.testing.assert_close(gain.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("source, target", PAIRS)
def test_side_paths_equal_baked_weights(
    bank: ToComBank, spec: VitSpec, make_vit: Callable, make_weights: Callable,
    make_images: Callable, source: int, target: int,
):  # fmt: skip
    vit = make_vit(spec)
    images = torch.from_numpy(make_images(spec))
    side = TrainableBank.from_bank(bank, spec).side(source, target, 0.1)
    with torch.inference_mode():
        plain = CompressedVit(vit)(images, target)
        beside = CompressedVit(vit)(images, target, side)
        variant = Variant.of(spec, target, source=source, scale=0.1)
        baked = bake(make_weights(spec), spec, bank, variant)
        assert set(baked) == set(qkv_weights(spec))
        vit.load_state_dict({n: torch.from_numpy(w) for n, w in baked.items()}, strict=False)
        inside = CompressedVit(vit)(images, target)
    assert (beside - plain).abs().max() > 1e-3
    torch.testing.assert_close(beside, inside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", [0, 9, 16])
def test_a_target_for_each_layer(bank: ToComBank, spec: VitSpec, tokens: torch.Tensor, source: int):
    targets = (16.0, float(source), 11.5)
    trained = TrainableBank.from_bank(bank, spec)
    side = trained.side(source, targets, 0.7)
    for layer, target in enumerate(targets):
        gaps = bank.gap(layer, source, target, 0.7)
        alone = trained.side(source, target, 0.7)
        for index, gain in enumerate(side(layer, tokens)):
            wanted = tokens.double() @ torch.from_numpy(gaps[index]).T
            torch.testing.assert_close(gain.double(), wanted, rtol=1e-5, atol=1e-4)
            if alone is None:
                assert not gain.any()
            else:
                torch.testing.assert_close(gain, alone(layer, tokens)[index], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("source", [0, 16])
def test_side_paths_of_a_schedule_equal_baked_weights(
    bank: ToComBank, spec: VitSpec, make_vit: Callable, make_weights: Callable,
    make_images: Callable, source: int,
):  # fmt: skip
    vit, images = make_vit(spec), torch.from_numpy(make_images(spec))
    variant = Variant.of(spec, FAST, "fast", source=source, scale=0.1)
    assert variant.targets == (16, 16, 11.5)
    side = TrainableBank.from_bank(bank, spec).side(source, variant.targets, variant.scale)
    with torch.inference_mode():
        plain = CompressedVit(vit)(images, FAST)
        beside = CompressedVit(vit)(images, FAST, side)
        baked = bake(make_weights(spec), spec, bank, variant)
        vit.load_state_dict({n: torch.from_numpy(w) for n, w in baked.items()}, strict=False)
        inside = CompressedVit(vit)(images, FAST)
    assert (beside - plain).abs().max() > 1e-3
    torch.testing.assert_close(beside, inside, rtol=1e-5, atol=1e-5)


def test_there_and_back_cancel(bank: ToComBank, spec: VitSpec, tokens: torch.Tensor):
    trained = TrainableBank.from_bank(bank, spec)
    there, back = trained.side(2, 11), trained.side(11, 2)
    for one, other in zip(there(1, tokens), back(1, tokens), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, -other)


def test_steps_add_up(bank: ToComBank, spec: VitSpec, tokens: torch.Tensor):
    trained = TrainableBank.from_bank(bank, spec)
    sides = [trained.side(*pair)(1, tokens) for pair in ((12, 3), (3, 7), (12, 7))]
    for first, second, both in zip(*sides, strict=True):
        torch.testing.assert_close(first + second, both, rtol=1e-4, atol=1e-4)


def test_no_side_path_between_equal_degrees(spec: VitSpec):
    trained = TrainableBank(spec, Method("tome"))
    assert trained.side(8, 8) is None
    assert trained.side(8, (8.0, 8.0, 8.0)) is None
    assert trained.side(8, (8.0, 8.0, 7.5)) is not None


def test_from_bank_and_back(bank: ToComBank, spec: VitSpec):
    trained = TrainableBank.from_bank(bank, spec)
    assert not trained.training
    returned = trained.to_bank()
    assert (returned.method, returned.model) == (bank.method, bank.model)
    for name, factor in bank.factors().items():
        np.testing.assert_array_equal(returned.factors()[name], factor)


def test_the_banks_scale_is_the_default(bank: ToComBank, spec: VitSpec, tokens: torch.Tensor):
    trained = TrainableBank.from_bank(bank, spec)
    trained.scale = 0.7
    torch.testing.assert_close(trained.side(0, 4)(0, tokens), trained.side(0, 4, 0.7)(0, tokens))


@pytest.mark.parametrize("changes", [{"width": 32}, {"depth": 2}], ids=str)
def test_a_bank_of_another_model(bank: ToComBank, make_spec: Callable, changes: dict):
    with pytest.raises(BankError, match=next(iter(changes))):
        TrainableBank.from_bank(bank, make_spec(**{"depth": 3, **changes}))


def test_dropout_only_while_training(bank: ToComBank, spec: VitSpec, tokens: torch.Tensor):
    trained = TrainableBank.from_bank(bank, spec)
    exact = trained.side(0, 8)(0, tokens)[0]
    torch.testing.assert_close(trained.side(0, 8)(0, tokens)[0], exact, rtol=0, atol=0)

    trained.train()
    torch.manual_seed(0)
    first, second = (trained.side(0, 8)(0, tokens)[0] for _ in range(2))
    assert not torch.equal(first, second)
    many = torch.stack([trained.side(0, 8)(0, tokens)[0] for _ in range(2000)])
    assert (many.mean(dim=0) - exact).abs().max() < 0.1 * exact.abs().max()

    trained.dropout = 0.0
    torch.testing.assert_close(trained.side(0, 8)(0, tokens)[0], exact)


def test_the_scale_is_not_rounded_with_the_tokens(bank: ToComBank, spec: VitSpec):
    """0.1 in bfloat16 is 0.1001: each step would be trained a thousandth too large."""
    tokens = torch.randn(32, 50, spec.width, generator=torch.Generator().manual_seed(0))
    trained = TrainableBank.from_bank(bank, spec)
    with torch.inference_mode():
        exact = trained.side(0, 8, 0.1)(0, tokens)[0]
        with torch.autocast("cpu", torch.bfloat16):
            gain = trained.side(0, 8, 0.1)(0, tokens)[0]
    assert gain.dtype == torch.bfloat16
    share = float((gain.float() * exact).sum() / exact.square().sum())
    assert share == pytest.approx(1, abs=3e-4)


def test_only_the_steps_between_are_trained(spec: VitSpec, tokens: torch.Tensor):
    bank = TrainableBank(spec, Method("tome"), dropout=0.0)
    q, v = bank.side(9, 4)(1, tokens)
    (q.sum() + v.sum()).backward()
    touched = bank.up.grad.abs().sum(dim=(3, 4)) > 0  # (L, q|v, G)
    wanted = torch.zeros_like(touched)
    wanted[1, :, 4:9] = True
    assert torch.equal(touched, wanted)


def test_each_layer_trains_the_steps_to_its_own_target(spec: VitSpec, tokens: torch.Tensor):
    bank = TrainableBank(spec, Method("tome"), dropout=0.0)
    side = bank.side(8, (4.0, 8.0, 10.5))
    sum(gain.sum() for layer in range(3) for gain in side(layer, tokens)).backward()
    touched = bank.up.grad.abs().sum(dim=(3, 4)) > 0  # (L, q|v, G)
    wanted = torch.zeros_like(touched)
    wanted[0, :, 4:8] = True
    wanted[2, :, 8:11] = True
    assert torch.equal(touched, wanted)


@pytest.fixture
def ablated(make_bank: Callable[..., ToComBank], spec: VitSpec) -> Callable[..., ToComBank]:
    """A bank of the paper's ablation, its groups all different."""

    def make(arithmetic: Any) -> ToComBank:
        return replace(make_bank(spec, groups=groups_of(arithmetic)), arithmetic=arithmetic)

    return make


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("source, target", PAIRS)
def test_side_paths_equal_baked_weights_in_every_arithmetic(
    ablated: Callable, spec: VitSpec, tokens: torch.Tensor, make_weights: Callable,
    arithmetic: Any, source: int, target: int,
):  # fmt: skip
    bank, weights, width = ablated(arithmetic), make_weights(spec), spec.width
    side = TrainableBank.from_bank(bank, spec).side(source, target, 0.3)
    baked = bake(weights, spec, bank, Variant.of(spec, target, source=source, scale=0.3))
    names = qkv_weights(spec)
    for layer in range(spec.depth):
        change = torch.from_numpy(baked[names[layer]] - weights[names[layer]])
        assert not change[width : 2 * width].any()  # keys
        q_and_v = change[:width], change[2 * width :]
        for gain, rows in zip(side(layer, tokens), q_and_v, strict=True):
            assert gain.abs().max() > 0.1
            torch.testing.assert_close(gain, tokens @ rows.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("source", [0, 9, 16])
def test_a_target_for_each_layer_in_every_arithmetic(
    ablated: Callable, spec: VitSpec, tokens: torch.Tensor, arithmetic: Any, source: int
):
    bank, targets = ablated(arithmetic), (4.0, 11.5, 12.25)
    side = TrainableBank.from_bank(bank, spec).side(source, targets, 0.3)
    for layer, target in enumerate(targets):
        gaps = bank.gap(layer, source, target, 0.3)
        for gain, gap in zip(side(layer, tokens), gaps, strict=True):
            assert gain.abs().max() > 0.1
            wanted = tokens.double() @ torch.from_numpy(gap).T
            torch.testing.assert_close(gain.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_trainable_banks_arithmetic_survives(ablated: Callable, spec: VitSpec, arithmetic: Any):
    bank = ablated(arithmetic)
    returned = TrainableBank.from_bank(bank, spec).to_bank()
    assert returned.arithmetic == arithmetic
    for name, factor in bank.factors().items():
        np.testing.assert_array_equal(returned.factors()[name], factor)


@pytest.mark.parametrize(
    ("arithmetic", "source", "target", "trained"),
    [
        ("steps", 4, 9, range(4, 9)),
        ("steps", 9, 4, range(4, 9)),
        ("shared", 4, 9, range(1)),
        ("shared", 9, 4, range(1)),
        ("no-inversion", 4, 9, range(4, 9)),
        ("no-inversion", 9, 4, range(20, 25)),
    ],
)
def test_which_groups_are_trained(
    spec: VitSpec, tokens: torch.Tensor, arithmetic: Any, source: int, target: int, trained: range
):
    bank = TrainableBank(spec, Method("tome"), dropout=0.0, arithmetic=arithmetic)
    q, v = bank.side(source, target)(0, tokens)
    (q.sum() + v.sum()).backward()
    touched = bank.up.grad[0].abs().sum(dim=(2, 3)) > 0  # (q|v, G)
    assert touched.shape[1] == groups_of(arithmetic)
    for projection in touched:
        assert projection.nonzero().flatten().tolist() == list(trained)


def test_a_shared_path_is_the_same_in_both_directions(
    ablated: Callable, spec: VitSpec, tokens: torch.Tensor
):
    bank = TrainableBank.from_bank(ablated("shared"), spec)
    wanted = bank.side(0, 16)(1, tokens)
    for pair in ((16, 0), (3, 4), (9, 2)):
        for found, expected in zip(bank.side(*pair)(1, tokens), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from tocom_export.compression.bake import bake
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.method import Method
from tocom_export.errors import BankError
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant

Tensors = dict[str, np.ndarray]
C = 16


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(width=C, heads=2, depth=3)


@pytest.fixture(scope="module")
def variant(spec: VitSpec) -> Callable[..., Variant]:
    """A variant of a source, a degree or a degree per layer, and a scale."""

    def make(source: int, degree: int | list[int], scale: float = 0.1) -> Variant:
        return Variant.of(spec, degree, "some", source=source, scale=scale)

    return make


@pytest.fixture(scope="module")
def tensors(make_weights: Callable[..., Tensors], spec: VitSpec) -> Tensors:
    return make_weights(spec)


@pytest.fixture(scope="module")
def bank(make_bank: Callable[..., ToComBank], spec: VitSpec) -> ToComBank:
    return make_bank(spec)


@pytest.mark.parametrize(("source", "target"), [(0, 16), (16, 0), (4, 9), (12, 3)])
def test_q_and_v_gain_the_gap_and_k_nothing(tensors, spec, bank, variant, source: int, target: int):
    baked = bake(tensors, spec, bank, variant(source, target))
    assert set(baked) == {f"blocks.{layer}.attn.qkv.weight" for layer in range(3)}
    for layer in range(3):
        name = f"blocks.{layer}.attn.qkv.weight"
        found, original = baked[name], tensors[name]
        gap_q, gap_v = bank.gap(layer, source, target, 0.1)
        assert (found.shape, found.dtype) == ((3 * C, C), np.float32)
        np.testing.assert_allclose(found[:C], original[:C] + gap_q, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(found[C : 2 * C], original[C : 2 * C])
        np.testing.assert_allclose(found[2 * C :], original[2 * C :] + gap_v, rtol=0, atol=1e-6)
        assert np.abs(found[:C] - original[:C]).max() > 1e-2
        assert np.abs(found[2 * C :] - original[2 * C :]).max() > 1e-2


@pytest.mark.parametrize("target", [0, 7, 16])
def test_at_the_source_nothing_changes(tensors, spec, bank, variant, target: int):
    for name, found in bake(tensors, spec, bank, variant(target, target)).items():
        np.testing.assert_array_equal(found, tensors[name])


def test_the_checkpoint_itself_is_left_alone(tensors, spec, bank, variant):
    before = {name: t.copy() for name, t in tensors.items()}
    bake(tensors, spec, bank, variant(0, 16))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, before[name])


def test_values_are_absolute(tensors, spec, bank, variant):
    """From A to B and to A again is A to the bit: nothing accumulates."""
    first = bake(tensors, spec, bank, variant(0, 4))
    bake(tensors, spec, bank, variant(0, 16))
    again = bake(tensors, spec, bank, variant(0, 4))
    for name, found in first.items():
        np.testing.assert_array_equal(found, again[name])


def test_the_scale_is_linear(tensors, spec, bank, variant):
    name = "blocks.1.attn.qkv.weight"
    once, twice = (
        bake(tensors, spec, bank, variant(0, 8, s))[name] - tensors[name] for s in (0.1, 0.2)
    )
    np.testing.assert_allclose(twice, 2 * once, rtol=0, atol=1e-6)


def test_sums_in_float64(tensors, spec, variant):
    """16 steps that cancel but for one, whose size float32 sums would lose."""
    down = np.ones((3, 16, 1, C), np.float32)
    up = np.zeros((3, 16, C, 1), np.float32)
    up[:, 0::2] = 1e8
    up[:, 1::2] = -1e8
    up[:, 15] += 1e-3 * 1e8
    up[:, 14] -= np.float32(1e-3 * 1e8)
    up[:, 3] = np.float32(-1e8) + 8
    bank = ToComBank(down, up, down, up, method=Method("tome"))
    exact = sum(up[0, g, 0, 0].astype(float) for g in range(16))
    zeros = {name: np.zeros_like(t) for name, t in tensors.items()}
    baked = bake(zeros, spec, bank, variant(0, 16, 1.0))["blocks.0.attn.qkv.weight"]
    assert exact == 8
    assert (baked[:C] == 8).all()


def test_the_original_is_added_before_rounding(tensors, spec, variant):
    down = np.full((3, 16, 1, C), 2.0**-20, np.float32)
    up = np.ones((3, 16, C, 1), np.float32)
    bank = ToComBank(down, up, down, up, method=Method("tome"))
    half = {name: np.full_like(t, 1 + 2.0**-7, ml_dtypes.bfloat16) for name, t in tensors.items()}
    baked = bake(half, spec, bank, variant(0, 16, 1.0))["blocks.0.attn.qkv.weight"]
    assert (baked[:C] == np.float32(1 + 2.0**-7 + 2.0**-16)).all()
    assert (baked[C : 2 * C] == np.float32(1 + 2.0**-7)).all()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("size", [1e38, -1e38])
@pytest.mark.parametrize(("down_q", "down_v"), [(8, 0), (0, 8)], ids=["queries", "values"])
def test_beyond_the_range_of_float32(
    tensors, spec, variant, down_q: float, down_v: float, size: float, scale: float
):
    """In the second layer alone."""
    down = np.zeros((3, 16, 1, C), np.float32)
    up = np.full((3, 16, C, 1), size, np.float32)
    downs = [np.where(np.arange(3)[:, None, None, None] == 1, d, down) for d in (down_q, down_v)]
    factors = (downs[0].astype(np.float32), up, downs[1].astype(np.float32), up)
    bank = ToComBank(*factors, method=Method("tome"))
    with pytest.raises(BankError) as caught:
        bake(tensors, spec, bank, variant(0, 8, scale))
    assert str(caught.value) == (
        f"`scale` {scale:g} takes blocks.1.attn.qkv.weight beyond float32's range; choose a "
        "smaller one."
    )
    for name, found in bake(tensors, spec, bank, variant(8, 8, scale)).items():
        np.testing.assert_array_equal(found, tensors[name])
    small = bake(tensors, spec, bank, variant(0, 8, 1e-3))
    assert all(np.isfinite(found).all() for found in small.values())


@pytest.mark.parametrize(
    ("degrees", "targets"),
    [
        ([16, 8, 3], (16, 16, 12)),
        ([0, 7, 9], (0, 0, 3.5)),
        ([12, 0, 0], (12, 12, 6)),
        ([20, 18, 20], (16, 16, 16)),
    ],
)
@pytest.mark.parametrize("source", [0, 5, 16])
def test_each_layer_gains_what_its_own_target_asks_for(
    tensors, spec, bank, variant, source: int, degrees: list[int], targets: tuple[float, ...]
):
    made = variant(source, degrees, 0.2)
    assert made.targets == targets
    baked = bake(tensors, spec, bank, made)
    for layer in range(3):
        name = f"blocks.{layer}.attn.qkv.weight"
        found, original = baked[name], tensors[name]
        gap_q, gap_v = bank.gap(layer, source, targets[layer], 0.2)
        np.testing.assert_array_equal(found[:C], (original[:C] + gap_q).astype(np.float32))
        np.testing.assert_array_equal(found[C : 2 * C], original[C : 2 * C])
        np.testing.assert_array_equal(found[2 * C :], (original[2 * C :] + gap_v).astype("f4"))


def test_a_list_of_one_degree_is_that_degree(tensors, spec, bank, variant):
    listed = bake(tensors, spec, bank, variant(4, [11] * 3))
    for name, found in bake(tensors, spec, bank, variant(4, 11)).items():
        np.testing.assert_array_equal(listed[name], found)

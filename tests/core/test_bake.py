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

Tensors = dict[str, np.ndarray]
C = 16


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(width=C, heads=2, depth=3)


@pytest.fixture(scope="module")
def tensors(make_weights: Callable[..., Tensors], spec: VitSpec) -> Tensors:
    return make_weights(spec)


@pytest.fixture(scope="module")
def bank(make_bank: Callable[..., ToComBank], spec: VitSpec) -> ToComBank:
    return make_bank(spec)


@pytest.mark.parametrize(("source", "target"), [(0, 16), (16, 0), (4, 9), (12, 3)])
def test_q_and_v_gain_the_gap_and_k_nothing(tensors, spec, bank, source: int, target: int):
    baked = bake(tensors, spec, bank, source, target, 0.1)
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
def test_at_the_source_nothing_changes(tensors, spec, bank, target: int):
    for name, found in bake(tensors, spec, bank, target, target, 0.1).items():
        np.testing.assert_array_equal(found, tensors[name])


def test_the_checkpoint_itself_is_left_alone(tensors, spec, bank):
    before = {name: t.copy() for name, t in tensors.items()}
    bake(tensors, spec, bank, 0, 16, 0.1)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, before[name])


def test_values_are_absolute(tensors, spec, bank):
    """From A to B and to A again is A to the bit: nothing accumulates."""
    first = bake(tensors, spec, bank, 0, 4, 0.1)
    bake(tensors, spec, bank, 0, 16, 0.1)
    again = bake(tensors, spec, bank, 0, 4, 0.1)
    for name, found in first.items():
        np.testing.assert_array_equal(found, again[name])


def test_the_scale_is_linear(tensors, spec, bank):
    name = "blocks.1.attn.qkv.weight"
    once, twice = (bake(tensors, spec, bank, 0, 8, s)[name] - tensors[name] for s in (0.1, 0.2))
    np.testing.assert_allclose(twice, 2 * once, rtol=0, atol=1e-6)


def test_sums_in_float64(tensors, spec):
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
    baked = bake(zeros, spec, bank, 0, 16, 1.0)["blocks.0.attn.qkv.weight"]
    assert exact == 8
    assert (baked[:C] == 8).all()


def test_the_original_is_added_before_rounding(tensors, spec):
    down = np.full((3, 16, 1, C), 2.0**-20, np.float32)
    up = np.ones((3, 16, C, 1), np.float32)
    bank = ToComBank(down, up, down, up, method=Method("tome"))
    half = {name: np.full_like(t, 1 + 2.0**-7, ml_dtypes.bfloat16) for name, t in tensors.items()}
    baked = bake(half, spec, bank, 0, 16, 1.0)["blocks.0.attn.qkv.weight"]
    assert (baked[:C] == np.float32(1 + 2.0**-7 + 2.0**-16)).all()
    assert (baked[C : 2 * C] == np.float32(1 + 2.0**-7)).all()


@pytest.mark.parametrize("scale", [1e38, -1e38, 1e300])
@pytest.mark.parametrize(("down_q", "down_v"), [(8, 0), (0, 8)], ids=["queries", "values"])
def test_beyond_the_range_of_float32(tensors, spec, down_q: float, down_v: float, scale: float):
    """In the second layer alone."""
    down = np.zeros((3, 16, 1, C), np.float32)
    up = np.ones((3, 16, C, 1), np.float32)
    downs = [np.where(np.arange(3)[:, None, None, None] == 1, d, down) for d in (down_q, down_v)]
    factors = (downs[0].astype(np.float32), up, downs[1].astype(np.float32), up)
    bank = ToComBank(*factors, method=Method("tome"))
    with pytest.raises(BankError) as caught:
        bake(tensors, spec, bank, 0, 8, scale)
    assert str(caught.value) == (
        f"scale {scale:g} takes blocks.1.attn.qkv.weight beyond float32's range; name a smaller."
    )
    for name, found in bake(tensors, spec, bank, 8, 8, scale).items():
        np.testing.assert_array_equal(found, tensors[name])
    assert all(np.isfinite(found).all() for found in bake(tensors, spec, bank, 0, 8, 1e35).values())

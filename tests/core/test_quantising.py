from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tocom_export.errors import CheckpointError
from tocom_export.graph.quantising import dequantize, quantize, quantized_layers, stored_form

QKV = "blocks.0.attn.qkv"


def test_a_channel_reaches_its_largest_value():
    weight = np.array([[0.5, -2.0, 1.0], [30.0, 10.0, -15.0]], np.float32)
    integers, scale = quantize(weight)
    assert integers.tolist() == [[32, -127, 64], [127, 42, -64]]
    np.testing.assert_allclose(scale, [2 / 127, 30 / 127], rtol=1e-6)


def test_the_error_is_half_a_step_at_most():
    weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    integers, scale = quantize(weight)
    assert integers.min() >= -127
    error = np.abs(integers * scale[:, None] - weight)
    assert (error <= 0.501 * scale[:, None]).all()


def test_a_channel_of_zeros():
    integers, scale = quantize(np.zeros((2, 3), np.float32))
    assert not integers.any()
    assert (scale == 1).all()


@pytest.mark.parametrize(
    "precision, dtype",
    [("fp32", np.float32), ("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)],
)
def test_stored_types(make_spec, make_weights, precision, dtype):
    spec = make_spec()
    tensors = make_weights(spec)
    stored = stored_form(tensors, precision, quantized_layers(spec))
    assert list(stored) == list(tensors)
    for name, tensor in stored.items():
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor, tensors[name].astype(dtype))


def test_int8_is_for_all_layers_of_blocks_but_the_first_qkv(make_spec, make_weights):
    spec = make_spec(adapter_width=8)
    tensors = make_weights(spec)
    stored = stored_form(tensors, "int8", quantized_layers(spec))
    integers = {name for name, tensor in stored.items() if tensor.dtype == np.int8}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    all_of_them = {f"blocks.{i}.{part}.weight" for i in range(spec.depth) for part in parts}
    assert integers == all_of_them - {"blocks.0.attn.qkv.weight"}
    for name in integers:
        assert stored[f"{name}_scale"].shape == (tensors[name].shape[0],)
    others = set(stored) - integers - {f"{name}_scale" for name in integers}
    assert all(stored[name].dtype == np.float32 for name in others)
    back = dequantize(stored)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        largest = np.abs(tensor).max()
        np.testing.assert_allclose(
            back[name], tensor, atol=largest / 250 if name in integers else 0
        )


@pytest.mark.parametrize("value", [70_000.0, -1e6])
def test_beyond_the_range_of_fp16(value: float):
    tensors = {"head.weight": np.full((2, 2), value, np.float32)}
    with pytest.raises(CheckpointError, match=r"head\.weight has values beyond ±65504.*bf16"):
        stored_form(tensors, "fp16", [])
    assert stored_form(tensors, "bf16", [])["head.weight"].dtype == ml_dtypes.bfloat16


def test_scales_of_one_layer_don_t_touch_another():
    stored = {
        f"{QKV}.weight": np.full((2, 2), 10, np.int8),
        f"{QKV}.weight_scale": np.array([0.5, 2], np.float32),
        "head.weight": np.ones((2, 2), np.float32),
    }
    back = dequantize(stored)
    assert set(back) == {f"{QKV}.weight", "head.weight"}
    np.testing.assert_array_equal(back[f"{QKV}.weight"], [[5, 5], [20, 20]])

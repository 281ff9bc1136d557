from __future__ import annotations

import json
from dataclasses import fields

import pytest

from tocom_export.errors import InputError
from tocom_export.io.json_codec import decode, encode
from tocom_export.model.rotary import Rotary
from tocom_export.model.spec import VitSpec

BASE = {
    "model": "m", "image_size": [224, 224], "patch_size": [16, 16], "width": 192, "depth": 12,
    "heads": 3, "mlp_width": 768, "classes": 1000,
}  # fmt: skip


def test_counts_of_deit_tiny():
    spec = decode(VitSpec, BASE)
    assert spec.grid == (14, 14)
    assert (spec.patches, spec.prefix, spec.tokens, spec.head_width) == (196, 1, 197, 64)


def test_the_grid_leaves_out_a_part_of_a_patch():
    spec = decode(VitSpec, {**BASE, "image_size": [47, 33], "patch_size": [16, 8]})
    assert spec.grid == (2, 4)


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({}, 1),
        ({"distilled": True}, 2),
        ({"registers": 4}, 5),
        ({"class_token": False, "pool": "avg"}, 0),
        ({"class_token": False, "pool": "avg", "registers": 4}, 4),
    ],
)
def test_prefix(changes: dict, prefix: int):
    spec = decode(VitSpec, {**BASE, **changes})
    assert spec.prefix == prefix
    assert spec.tokens == 196 + prefix
    assert spec.weights()["pos_embed"] == (1, 196 + prefix, 192)
    if changes.get("distilled"):
        return  # its prefix always has positions
    spec = decode(VitSpec, {**BASE, **changes, "prefix_positions": False})
    assert spec.weights()["pos_embed"] == (1, 196, 192)


def test_json_leaves_out_defaults_and_comes_back():
    spec = decode(VitSpec, {**BASE, "pool": "token", "eps": 1e-6})
    assert encode(spec, defaults=False) == BASE
    assert decode(VitSpec, json.loads(json.dumps(encode(spec)))) == spec


def test_json_keeps_every_field():
    spec = VitSpec(
        model="m", image_size=(32, 48), patch_size=(4, 8), width=64, depth=2, heads=4,
        mlp_width=96, classes=0, channels=1, eps=1e-5, activation="quick_gelu", qkv_bias=False,
        linear_bias=False, patch_bias=False, class_token=False, distilled=False, registers=3,
        prefix_positions=False, pre_norm=True, layer_scale=True, qk_norm=True, pool="avg",
        final_norm=None, family="relpos", norms="rms", positions=False,
        rotary=Rotary("cat", 100.0, True, "xy", 1.0, (4, 6)), relative="mlp", relative_width=8,
        patch_norm=True, post_norm=True, k_bias=False, split_qkv=True, attention_norm=True,
        mlp="gated", mlp_norm=True, head_bias=False, mlp_scale=False, projection=8,
    )  # fmt: skip
    left_out = {"distilled", "adapter_width", "pool_heads", "pool_mlp_width", "pool_prefix"}
    assert encode(spec, defaults=False).keys() == {f.name for f in fields(spec)} - left_out
    assert encode(spec).keys() == {f.name for f in fields(spec)} - left_out | {
        "distilled", "adapter_width",
    }  # fmt: skip
    assert decode(VitSpec, json.loads(json.dumps(encode(spec)))) == spec


def test_an_adapter_adds_two_linear_layers_to_each_mlp():
    plain = decode(VitSpec, BASE)
    assert plain.adapter_width == 0
    adapted = decode(VitSpec, {**BASE, "adapter_width": 32})
    assert decode(VitSpec, json.loads(json.dumps(encode(adapted)))) == adapted
    added = {
        f"blocks.{layer}.mlp.{name}": shape
        for layer in range(12)
        for name, shape in (
            ("adapter_down.weight", (32, 192)),
            ("adapter_down.bias", (32,)),
            ("adapter_up.weight", (192, 32)),
            ("adapter_up.bias", (192,)),
        )
    }
    assert adapted.weights() == {**plain.weights(), **added}


def test_unknown_field():
    with pytest.raises(InputError, match="patches_size"):
        decode(VitSpec, {**BASE, "patches_size": 3})


@pytest.mark.parametrize("name", BASE)
def test_missing_field(name: str):
    with pytest.raises(InputError, match=f"missing required field {name}"):
        decode(VitSpec, {k: v for k, v in BASE.items() if k != name})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", 3, "model: expected str, got int."),
        ("image_size", 224, "image_size: expected array, got int."),
        ("image_size", [224], "image_size: expected array of length 2, got 1."),
        ("image_size", [224, 224, 3], "image_size: expected array of length 2, got 3."),
        ("image_size", [224, 0], "image_size[1]: expected int >= 1."),
        ("image_size", [224.0, 224], "image_size[0]: expected int, got float."),
        ("image_size", "ab", "image_size: expected array, got str."),
        ("width", "192", "width: expected int, got str."),
        ("width", 192.0, "width: expected int, got float."),
        ("width", True, "width: expected int, got bool."),
        ("width", 0, "width: expected int >= 1."),
        ("width", 10**400, "width: expected int <= 1000000."),
        ("depth", -1, "depth: expected int >= 1."),
        ("depth", 1_000_001, "depth: expected int <= 1000000."),
        ("heads", None, "heads: expected int, got null."),
        ("heads", 0, "heads: expected int >= 1."),
        ("classes", -1, "classes: expected int >= 0."),
        ("registers", -1, "registers: expected int >= 0."),
        ("adapter_width", -1, "adapter_width: expected int >= 0."),
        ("adapter_width", 32.0, "adapter_width: expected int, got float."),
        ("adapter_width", None, "adapter_width: expected int, got null."),
        ("eps", 0, "eps: expected float > 0.0."),
        ("eps", 1, "eps: expected float < 1.0."),
        ("eps", "1e-6", "eps: expected float, got str."),
        ("eps", True, "eps: expected float, got bool."),
        ("eps", float("nan"), "eps: expected float > 0.0."),
        ("eps", float("inf"), "eps: expected float < 1.0."),
        ("activation", "swish", "activation: invalid enum value 'swish'."),
        ("activation", ["gelu"], "activation: expected str, got array."),
        ("pool", "max", "pool: invalid enum value 'max'."),
        ("pool", None, "pool: expected str, got null."),
        ("final_norm", "rms", "final_norm: invalid enum value 'rms'."),
        ("qkv_bias", 1, "qkv_bias: expected bool, got int."),
        ("qkv_bias", "true", "qkv_bias: expected bool, got str."),
    ],
)
def test_wrong_value(name: str, value: object, message: str):
    with pytest.raises(InputError) as caught:
        decode(VitSpec, {**BASE, name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["", "a/b", "../m", "-m", "m n", "m\n", ".m", "ä"])
def test_a_name_that_is_no_folders(name: str):
    with pytest.raises(InputError) as caught:
        decode(VitSpec, {**BASE, "model": name})
    assert repr(name) in str(caught.value)


def test_width_must_divide_into_heads():
    with pytest.raises(InputError, match=r"192.* 5 heads"):
        decode(VitSpec, {**BASE, "heads": 5})


def test_image_smaller_than_a_patch():
    with pytest.raises(InputError, match="smaller than a patch"):
        decode(VitSpec, {**BASE, "image_size": [15, 224]})


def test_token_pool_needs_a_class_token():
    with pytest.raises(InputError, match="class token"):
        decode(VitSpec, {**BASE, "class_token": False})


@pytest.mark.parametrize("pool", ["token", "avg", "token_avg"])
def test_only_attention_pooling_reads_the_prefix_beside_it(pool: str):
    with pytest.raises(InputError, match=f"pool '{pool}' reads no prefix"):
        decode(VitSpec, {**BASE, "pool": pool, "pool_prefix": True})


def test_the_branches_that_are_scaled():
    def scaled(**changes: bool) -> tuple[int, ...]:
        return decode(VitSpec, {**BASE, **changes}).scaled

    assert scaled() == scaled(mlp_scale=False) == ()
    assert scaled(layer_scale=True) == (1, 2)
    assert scaled(layer_scale=True, mlp_scale=False) == (1,)


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "avg"},
        {"class_token": False, "pool": "avg"},
        {"registers": 4},
        {"prefix_positions": False},
        {"final_norm": "fc_norm"},
    ],
)
def test_what_timms_distilled_model_has_not(changes: dict):
    with pytest.raises(InputError, match="distilled"):
        decode(VitSpec, {**BASE, "distilled": True, **changes})

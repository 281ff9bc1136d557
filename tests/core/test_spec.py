from __future__ import annotations

import json
from dataclasses import fields

import pytest

from tocom_export.errors import InputError
from tocom_export.model.spec import VitSpec

BASE = {
    "model": "m", "image_size": [224, 224], "patch_size": [16, 16], "width": 192, "depth": 12,
    "heads": 3, "mlp_width": 768, "classes": 1000,
}  # fmt: skip


def test_counts_of_deit_tiny():
    spec = VitSpec.from_json(BASE)
    assert spec.grid == (14, 14)
    assert (spec.patches, spec.prefix, spec.tokens, spec.head_width) == (196, 1, 197, 64)


def test_the_grid_leaves_out_a_part_of_a_patch():
    spec = VitSpec.from_json({**BASE, "image_size": [47, 33], "patch_size": [16, 8]})
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
    spec = VitSpec.from_json({**BASE, **changes})
    assert spec.prefix == prefix
    assert spec.tokens == 196 + prefix
    assert spec.weights()["pos_embed"] == (1, 196 + prefix, 192)
    if changes.get("distilled"):
        return  # its prefix always has positions
    spec = VitSpec.from_json({**BASE, **changes, "prefix_positions": False})
    assert spec.weights()["pos_embed"] == (1, 196, 192)


def test_json_leaves_out_defaults_and_comes_back():
    spec = VitSpec.from_json({**BASE, "pool": "token", "eps": 1e-6})
    assert spec.to_json() == BASE
    assert VitSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_json_keeps_every_field():
    spec = VitSpec(
        model="m", image_size=(32, 48), patch_size=(4, 8), width=64, depth=2, heads=4,
        mlp_width=96, classes=0, channels=1, eps=1e-5, activation="quick_gelu", qkv_bias=False,
        linear_bias=False, patch_bias=False, class_token=False, distilled=False, registers=3,
        prefix_positions=False, pre_norm=True, layer_scale=True, qk_norm=True, pool="avg",
        final_norm=None, adapter_width=8,
    )  # fmt: skip
    assert len(spec.to_json()) == len(fields(spec)) - 1  # distilled is left out
    assert VitSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_an_adapter_adds_two_linear_layers_to_each_mlp():
    plain = VitSpec.from_json(BASE)
    assert plain.adapter_width == 0
    adapted = VitSpec.from_json({**BASE, "adapter_width": 32})
    assert VitSpec.from_json(json.loads(json.dumps(adapted.to_json()))) == adapted
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
        VitSpec.from_json({**BASE, "patches_size": 3})


@pytest.mark.parametrize("name", BASE)
def test_missing_field(name: str):
    with pytest.raises(InputError, match=name):
        VitSpec.from_json({k: v for k, v in BASE.items() if k != name})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3),
        ("image_size", 224),
        ("image_size", [224]),
        ("image_size", [224, 224, 3]),
        ("image_size", [224, 0]),
        ("image_size", [224.0, 224]),
        ("image_size", "ab"),
        ("width", "192"),
        ("width", 192.0),
        ("width", True),
        ("width", 0),
        ("depth", -1),
        ("heads", None),
        ("classes", -1),
        ("registers", -1),
        ("adapter_width", -1),
        ("adapter_width", 32.0),
        ("adapter_width", None),
        ("eps", 0),
        ("eps", "1e-6"),
        ("eps", True),
        ("eps", float("nan")),
        ("eps", float("inf")),
        ("activation", "swish"),
        ("activation", ["gelu"]),
        ("pool", "map"),
        ("pool", None),
        ("final_norm", "rms"),
        ("qkv_bias", 1),
        ("qkv_bias", "true"),
    ],
)
def test_wrong_value(name: str, value: object):
    with pytest.raises(InputError) as caught:
        VitSpec.from_json({**BASE, name: value})
    assert repr(name) in str(caught.value)
    assert repr(value) in str(caught.value)


def test_width_must_divide_into_heads():
    with pytest.raises(InputError, match=r"192.* 5 heads"):
        VitSpec.from_json({**BASE, "heads": 5})


def test_image_smaller_than_a_patch():
    with pytest.raises(InputError, match="smaller than a patch"):
        VitSpec.from_json({**BASE, "image_size": [15, 224]})


def test_token_pool_needs_a_class_token():
    with pytest.raises(InputError, match="class token"):
        VitSpec.from_json({**BASE, "class_token": False})


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
        VitSpec.from_json({**BASE, "distilled": True, **changes})

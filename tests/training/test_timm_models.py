from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch

from tocom_export.errors import UnknownModelError, UnsupportedModelError
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.model.spec import VitSpec
from tocom_export.training.building import vit_from_spec
from tocom_export.training.timm_models import spec_of_name

NO_CLASS = {"class_token": False, "pool": "avg"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distilled": True},
        {"registers": 4},
        {"prefix_positions": False},
        {"pre_norm": True},
        {"pre_norm": True, "patch_bias": False},
        {"patch_bias": False},
        {"layer_scale": True},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"linear_bias": False},
        {"pool": "avg"},
        {"pool": "avg", "final_norm": "fc_norm"},
        {"final_norm": "fc_norm"},
        {"final_norm": None},
        {**NO_CLASS, "registers": 3},
        {"classes": 0},
        {"eps": 1e-5},
        {"channels": 1, "image_size": [64, 32], "patch_size": [16, 8]},
        {"mlp_width": 100},
        {"adapter_width": 8},
        {"adapter_width": 5, "distilled": True, "linear_bias": False},
        {"width": 352, "heads": 11, "mlp_width": 240},
        *({"activation": a} for a in ("gelu", "gelu_tanh", "quick_gelu", "relu")),
    ],
    ids=str,
)
def test_a_spec_becomes_its_model_and_its_model_the_spec(make_spec, changes: dict):
    spec = make_spec(**changes)
    vit = vit_from_spec(spec)
    assert spec_from_timm(vit, "small") == spec
    assert {n: tuple(t.shape) for n, t in vit.state_dict().items()} == spec.weights()


NAMES = [
    "deit_tiny_patch16_224",
    "deit_base_distilled_patch16_384",
    "deit3_small_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch32_clip_quickgelu_224",
    "vit_large_patch14_clip_336",
    "vit_base_patch16_siglip_gap_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_so400m_patch14_siglip_gap_378",
    "vit_giant_patch14_224",
    "vit_medium_patch16_reg4_gap_256",
]


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_a_model_of_timm(name: str):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
        spec = spec_of_name(name)
        again = spec_from_timm(vit_from_spec(spec), name)
    assert {n: tuple(t.shape) for n, t in state.items()} == spec.weights()
    assert again == spec


def test_deit_tiny():
    assert spec_of_name("deit_tiny_patch16_224.fb_in1k") == VitSpec(
        model="deit_tiny_patch16_224", image_size=(224, 224), patch_size=(16, 16), width=192,
        depth=12, heads=3, mlp_width=768, classes=1000,
    )  # fmt: skip


def test_no_weights_are_made(monkeypatch: pytest.MonkeyPatch):
    devices: list[str] = []
    create = timm.create_model

    def spy(*args: Any, **kwargs: Any) -> Any:
        model = create(*args, **kwargs)
        devices.extend({p.device.type for p in model.parameters()})
        return model

    monkeypatch.setattr(timm, "create_model", spy)
    assert spec_of_name("vit_giant_patch14_224").width == 1408
    assert devices == ["meta"]


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(UnknownModelError) as caught:
        spec_of_name("deit_tiny_patch16_225")
    assert "deit_tiny_patch16_225" in str(caught.value)
    assert "deit_tiny_patch16_224" in str(caught.value)


@pytest.mark.parametrize("name", ["", "nothing_like_it", "deit*", "../weights", "hf-hub:x/y"])
def test_an_unknown_name(name: str):
    with pytest.raises(UnknownModelError, match=r"^`model` "):
        spec_of_name(name)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_an_unsupported_name(name: str):
    with pytest.raises(UnsupportedModelError, match=name):
        spec_of_name(name)


def test_drop_path_is_for_training_alone(make_spec: Callable[..., VitSpec]):
    vit = vit_from_spec(make_spec(), drop_path=0.5)
    images = torch.randn(8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(vit(images), vit(images))
        vit.train()
        assert not torch.equal(vit(images), vit(images))


def test_adapters_of_a_spec_have_no_scale(make_spec: Callable[..., VitSpec]):
    vit: Any = vit_from_spec(make_spec(adapter_width=8))
    assert [block.mlp.scale for block in vit.blocks] == [1.0] * 4
    assert not any(module.training for module in vit.modules())

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tocom_export.errors import InputError, UnsupportedModelError
from tocom_export.model.from_timm import preprocess_from_cfg, spec_from_timm
from tocom_export.model.spec import VitSpec
from tocom_export.training.adaptformer import AdaptedMlp, add_adapters

UNSUPPORTED = {
    "swin_tiny_patch4_window7_224": "SwinTransformer",
    "convnext_atto": "ConvNeXt",
    "samvit_base_patch16": "VisionTransformerSAM (windows, relative positions)",
    "naflexvit_base_patch16_gap": "NaFlexVit (images of varying size)",
    "vit_large_patch16_sapiens2": "queries that share keys (GQA)",
    "vit_dlittle_patch16_reg1_gap_256": "DiffAttention",
    "resnet18": "ResNet",
    "cait_xxs24_224": "Cait",
    "vit_base_patch16_xp_224": "ParallelScalingBlock",
    "vit_base_r50_s16_224": "HybridEmbed (convolutions)",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_model_is_refused_by_its_part(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError) as caught:
        spec_from_timm(model, name)
    assert name in str(caught.value)
    assert UNSUPPORTED[name] in caught.value.part
    assert caught.value.part in str(caught.value)


def change(path: str, module: Any) -> Callable[[Any], None]:
    def apply(vit: Any) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            vit = getattr(vit, parent)
        setattr(vit, last, module)

    return apply


@pytest.mark.parametrize(
    ("apply", "part"),
    [
        (change("global_pool", "max"), "pooling 'max'"),
        (change("pool_include_prefix", True), "prefix"),
        (change("pos_embed", None), "position embedding"),
        (change("patch_embed", nn.LayerNorm(64)), "patch embedding LayerNorm"),
        (change("patch_drop", nn.Dropout()), "patch dropout"),
        (change("blocks.1", nn.Identity()), "block Identity"),
        (change("blocks.1.attn", nn.Linear(1, 1)), "attention Linear"),
        (change("blocks.1.mlp", nn.Linear(1, 1)), "MLP Linear"),
        (change("blocks.1.mlp.fc1", nn.Conv2d(1, 1, 1)), "convolutions"),
        (change("blocks.1.mlp.norm", nn.LayerNorm(64, eps=1e-6)), "differ"),
        (change("blocks.1.ls1", nn.Linear(1, 1)), "layer scale"),
        (change("blocks.1.norm2", nn.BatchNorm1d(64)), "BatchNorm1d"),
        (change("blocks.1.norm2", nn.LayerNorm(64, eps=0.1)), "epsilon"),
        (change("blocks.1.norm2", nn.LayerNorm(64, 1e-6, elementwise_affine=False)), "LayerNorm"),
        (change("norm", nn.LayerNorm(64, eps=1e-6, bias=False)), "bias"),
        (change("blocks.0.mlp.act", nn.Tanh()), "activation Tanh"),
    ],
)
def test_a_changed_part_is_refused(
    make_vit: Callable[..., Any], make_spec: Callable[..., VitSpec], apply: Callable, part: str
):
    vit = make_vit(make_spec(depth=2))
    apply(vit)
    with pytest.raises(UnsupportedModelError) as caught:
        spec_from_timm(vit, "mine")
    assert part in caught.value.part


@pytest.mark.parametrize(
    "apply",
    [
        change("blocks.1.mlp.act", nn.ReLU()),
        change("blocks.1.ls1", nn.Identity()),
        change("blocks.1.attn.q_norm", nn.LayerNorm(16, eps=1e-6)),
        change("blocks.1.attn.qkv", nn.Linear(64, 192, bias=False)),
        change("blocks.1.mlp", timm.layers.Mlp(64, 96)),
        change("blocks.1.mlp", AdaptedMlp(timm.layers.Mlp(64, 128), 8, 1.0)),
    ],
    ids=["activation", "layer scale", "q norm", "qkv bias", "mlp width", "adapter"],
)
def test_layers_that_differ_are_refused(
    make_vit: Callable[..., Any], make_spec: Callable[..., VitSpec], apply: Callable
):
    vit = make_vit(make_spec(depth=2, layer_scale=True))
    apply(vit)
    with pytest.raises(UnsupportedModelError):
        spec_from_timm(vit, "mine")


def test_adapters_are_part_of_the_spec(
    make_vit: Callable[..., Any], make_spec: Callable[..., VitSpec]
):
    vit = make_vit(make_spec(depth=2))
    add_adapters(vit, 8)
    assert spec_from_timm(vit, "small") == make_spec(depth=2, adapter_width=8)
    vit.blocks[1].mlp = AdaptedMlp(timm.layers.Mlp(64, 128), 16, 1.0)
    with pytest.raises(UnsupportedModelError, match="layers that differ"):
        spec_from_timm(vit, "small")


def test_a_subclass_from_elsewhere_is_refused():
    class VisionTransformer(timm.models.VisionTransformer):
        pass

    with torch.device("meta"), pytest.raises(UnsupportedModelError, match="outside timm"):
        spec_from_timm(VisionTransformer(depth=1))


@pytest.mark.parametrize("odd", [{"crop_mode": "border"}, {"interpolation": "lanczos"}])
def test_statistics_that_are_not_ours_are_refused(odd: dict[str, str]):
    with pytest.raises(InputError, match=f"can't be .*{next(iter(odd.values()))}"):
        preprocess_from_cfg(odd)


def test_a_plain_module_is_refused():
    with pytest.raises(UnsupportedModelError, match="model class Linear"):
        spec_from_timm(nn.Linear(2, 2))


def test_the_name_is_timms_where_none_is_given():
    with torch.device("meta"):
        vit = timm.create_model("deit_tiny_patch16_224", num_classes=7)
    spec = spec_from_timm(vit)
    assert spec.model == "deit_tiny_patch16_224"
    assert spec.classes == 7
    assert spec_from_timm(vit, "mine").model == "mine"

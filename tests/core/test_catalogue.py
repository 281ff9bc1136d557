"""What is known of timm's models without timm agrees with the timm that is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch

from tocom_export.errors import UnknownModelError, UnsupportedModelError
from tocom_export.model.catalogue import ASSETS, known_model
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.training.timm_models import spec_of_name

MIXED = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
"""Classes of which one model differs from the next in what a spec can't express of it."""
FILLS = ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "copy_")


def find_part(find: Callable[[str], object], name: str) -> str | None:
    """The part for which a model is refused; None where it isn't."""
    try:
        find(name)
    except UnsupportedModelError as error:
        assert str(error).startswith(f"{name}: {error.part} is not supported.")
        return error.part
    return None


@pytest.fixture
def ask_timm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str | None]:
    """The part that timm's model of a name is refused for.

    No weights are filled, and of a class that is refused as such one model is made.
    """
    for fill in FILLS:
        monkeypatch.setattr(torch.Tensor, fill, lambda self, *_, **__: self)
    parts: dict[Any, str | None] = {}
    asked = ""

    def wrap(build: Callable[..., Any]) -> Callable[..., Any]:
        def call(kind: Any, name: str, *arguments: Any, **options: Any) -> Any:
            if name == asked and (part := parts.get(kind)):
                raise UnsupportedModelError(name, part)
            model = build(kind, name, *arguments, **options)
            if name == asked and kind.__name__ not in MIXED:  # no backbone within another
                parts[kind] = find_part(partial(spec_from_timm, model), name)
            return model

        return call

    def ask(name: str) -> str | None:
        nonlocal asked
        asked = name
        return find_part(spec_of_name, name)

    timm.list_models()  # imports its modules
    for module in [module for name, module in sys.modules.items() if "timm.models" in name]:
        if hasattr(module, "build_model_with_cfg"):
            monkeypatch.setattr(module, "build_model_with_cfg", wrap(module.build_model_with_cfg))
    return ask


def test_every_model_of_timm_is_refused_for_the_same_reason_without_it(
    ask_timm: Callable[[str], str | None],
):
    names = timm.list_models()
    assert len(names) > 1000
    ours = {name: find_part(known_model, name) for name in names}
    assert ours == {name: ask_timm(name) for name in names}, "run scripts/list_models.py"
    assert sum(part is None for part in ours.values()) >= 250


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("swin_tiny_patch4_window7_224", "model class SwinTransformer"),
        ("resnet50.a1_in1k", "model class ResNet"),
        ("naflexvit_base_patch16_gap", "NaFlexVit (images of varying size)"),
        ("naflexvit_so400m_patch16_siglip.v2_webli", "NaFlexVit (images of varying size)"),
        ("vit_base_patch16_xp_224", "block ParallelScalingBlock"),
        ("vit_small_patch16_18x2_224", "block ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256.sbb_in1k", "attention DiffAttention"),
        ("vit_large_patch16_sapiens2.fb", "queries that share keys (GQA)"),
        ("samvit_base_patch16", "VisionTransformerSAM (windows, relative positions)"),
        ("samvit_huge_patch16.sa1b", "VisionTransformerSAM (windows, relative positions)"),
        ("vit_base_r50_s16_224", "patch embedding HybridEmbed (convolutions)"),
        ("vit_small_r26_s32_224.augreg_in21k", "patch embedding HybridEmbed (convolutions)"),
        ("vit_tiny_r_s16_p8_224", "patch embedding HybridEmbed (convolutions)"),
        ("vit_base_mci_224.apple_mclip", "patch embedding HybridEmbed (convolutions)"),
        ("vitamin_base_224", "patch embedding HybridEmbed (convolutions)"),
        ("qwen3_vit_88m", "model class Qwen3VitClassifier"),
        ("gemma4_vit_167m_enc", "model class Gemma4VitEncoder"),
        ("deepseek_vit_412m", "model class DeepseekVitClassifier"),
    ],
)
def test_a_model_is_refused_by_its_part(name: str, part: str):
    with pytest.raises(UnsupportedModelError) as caught:
        known_model(name)
    assert str(caught.value) == f"{name.split('.')[0]}: {caught.value.part} is not supported."
    assert caught.value.part.endswith(part)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_22", "vit_base_patch16_siglip_22", ""])
def test_a_name_that_nobody_knows(name: str):
    with pytest.raises(UnknownModelError, match=f"^`model` {name}: no model of that name"):
        known_model(name)


def test_near_names_are_those_that_can_be_built():
    with pytest.raises(UnknownModelError) as caught:
        known_model("vit_base_patch16_siglip_gap_22")
    near = str(caught.value).partition("Did you mean ")[2].rstrip("?").split(" or ")
    assert near[0] == "vit_base_patch16_siglip_gap_224"
    assert all(known_model(name)[0].model == name for name in near)


def test_the_list_is_small():
    assert (ASSETS / "unsupported_models.json").stat().st_size < 60_000

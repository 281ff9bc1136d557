from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tocom_export.compression.method import Method
from tocom_export.errors import InputError, UnsupportedModelError
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.training.adaptformer import (
    AdaptedMlp,
    add_adapters,
    freeze_all_but_adapters,
    merge_adapter_scale,
)
from tocom_export.training.building import vit_from_spec
from tocom_export.training.model import CompressedVit

WIDTH, SCALE = 8, 0.1


@pytest.fixture
def images(make_spec: Callable, make_images: Callable) -> Tensor:
    return torch.from_numpy(make_images(make_spec(), 2))


@pytest.fixture
def adapted(make_vit: Callable, make_spec: Callable) -> Callable[..., Any]:
    """A small model whose adapters are no longer zero."""

    def make(scale: float = SCALE, **changes: Any) -> Any:
        vit = make_vit(make_spec(**changes))
        add_adapters(vit, WIDTH, scale)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in vit.named_parameters():
                if "adapter_" in name:
                    parameter.normal_(0, 0.3, generator=generator)
        return vit

    return make


def test_one_mlp_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    mlp = AdaptedMlp(timm.layers.Mlp(6, 10), 4, 10.0)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(2, 5, 6, generator=generator)
    w = mlp.state_dict()
    hidden = nn.functional.gelu(x @ w["fc1.weight"].T + w["fc1.bias"])
    branch = (x @ w["adapter_down.weight"].T + w["adapter_down.bias"]).clamp(min=0)
    branch = branch @ w["adapter_up.weight"].T + w["adapter_up.bias"]
    expected = hidden @ w["fc2.weight"].T + w["fc2.bias"] + 10.0 * branch
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-4)


def test_an_adapter_starts_as_adaptformers():
    mlp = timm.layers.Mlp(64, 128).double().eval()
    added = AdaptedMlp(mlp, 32, 0.1)
    down, up = added.adapter_down, added.adapter_up
    assert down.weight.abs().max() <= 64**-0.5  # Kaiming-uniform's bound at a = √5
    assert down.weight.std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.1)
    assert not any(zero.any() for zero in (down.bias, up.weight, up.bias))
    assert {p.dtype for p in added.parameters()} == {torch.float64}
    assert not any(module.training for module in added.modules())
    assert added.fc1 is mlp.fc1
    assert added.fc2 is mlp.fc2


def test_adding_changes_no_name_no_weight_and_no_output(make_vit, make_spec, images):
    vit = make_vit(make_spec())
    with torch.inference_mode():
        before, plain = vit(images), copy.deepcopy(vit.state_dict())
    add_adapters(vit)
    state = vit.state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == make_spec(adapter_width=32).weights()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    with torch.inference_mode():
        assert torch.equal(vit(images), before)


@pytest.mark.parametrize("changes", [{}, {"layer_scale": True}], ids=str)
def test_the_branch_stands_beside_the_mlp_in_every_layer(adapted, images, changes: dict):
    vit = adapted(**changes)
    with torch.inference_mode():
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for block in vit.blocks:
            x = x + block.ls1(block.attn(block.norm1(x)))
            normed, mlp = block.norm2(x), block.mlp
            branch = mlp.adapter_up(mlp.adapter_down(normed).relu())
            x = x + block.ls2(mlp.fc2(mlp.act(mlp.fc1(normed))) + SCALE * branch)
        expected = vit.forward_head(vit.norm(x))
        found = CompressedVit(vit).eval()(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "heads"),
    [({}, ["head"]), ({"distilled": True}, ["head", "head_dist"]), ({"classes": 0}, [])],
    ids=str,
)
def test_adapters_and_heads_alone_are_trained(adapted, make_images, make_spec, changes, heads):
    vit = adapted(**changes)
    freeze_all_but_adapters(vit)
    expected = {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
    for layer in range(4):
        for name in ("adapter_down", "adapter_up"):
            expected |= {f"blocks.{layer}.mlp.{name}.{part}" for part in ("weight", "bias")}
    assert {n for n, p in vit.named_parameters() if p.requires_grad} == expected

    images = torch.from_numpy(make_images(make_spec(**changes), 2))
    CompressedVit(vit).train()(images, 8).square().sum().backward()
    assert {n for n, p in vit.named_parameters() if p.grad is not None} == expected
    assert all(p.grad.any() for p in vit.parameters() if p.requires_grad)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_saved_form_has_no_scale(adapted, images, scale: float):
    vit = adapted(scale)
    before = copy.deepcopy(vit.state_dict())
    saved = merge_adapter_scale(vit)
    assert all(torch.equal(tensor, before[n]) for n, tensor in vit.state_dict().items())
    for name, tensor in saved.items():
        assert torch.equal(tensor, before[name] * (scale if "adapter_up" in name else 1)), name
    again = vit_from_spec(spec_from_timm(vit, "small"))
    again.load_state_dict(saved)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), vit(images), rtol=1e-5, atol=1e-5)


def test_the_saved_form_of_a_model_without_adapters(make_vit, make_spec):
    vit = make_vit(make_spec())
    saved, state = merge_adapter_scale(vit), vit.state_dict()
    assert list(saved) == list(state)
    assert all(torch.equal(saved[name], state[name]) for name in state)


def test_saved_adapters_go_on_at_the_scale_asked_for(adapted, images):
    vit = adapted(0.1)
    again: Any = vit_from_spec(spec_from_timm(vit, "small"))
    again.load_state_dict(merge_adapter_scale(vit))
    modules = [block.mlp for block in again.blocks]
    add_adapters(again, WIDTH, 0.1)
    assert [block.mlp for block in again.blocks] == modules
    for name, tensor in vit.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), vit(images), rtol=1e-5, atol=1e-5)


def test_adapters_of_another_width_are_refused(adapted):
    with pytest.raises(
        InputError, match=r"^`adapter_width` 16: .* of 8; choose `adapter_width` 8,"
    ):
        add_adapters(adapted(), 16)


def test_an_unsupported_model_is_refused():
    with torch.device("meta"):
        vit = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(UnsupportedModelError, match="SwinTransformer"):
        add_adapters(vit)


@pytest.mark.parametrize("method", ["tome", "evit"])
def test_adapters_matter_at_every_degree(adapted, make_vit, make_spec, images, method: Any):
    models = [CompressedVit(v, Method(method)).eval() for v in (adapted(), make_vit(make_spec()))]
    for degree in (0, 8, 16):
        with torch.inference_mode():
            with_adapters, without = (model(images, degree) for model in models)
        assert (with_adapters - without).abs().max() > 1e-3

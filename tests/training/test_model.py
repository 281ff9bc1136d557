from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from tocom_export.compression.bake import bake
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule
from tocom_export.errors import DegreeError, UnsupportedModelError
from tocom_export.model.spec import VitSpec
from tocom_export.training.model import CompressedVit
from tocom_export.variant import Variant

VARIANTS: list[dict[str, Any]] = [
    {},
    {"distilled": True},
    {"registers": 4, "layer_scale": True},
    {"pool": "avg", "final_norm": "fc_norm"},
    {"class_token": False, "pool": "avg"},
    {"qk_norm": True, "pre_norm": True, "activation": "quick_gelu"},
    {"classes": 0},
]


@pytest.fixture
def batch(make_images: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    return lambda spec, size=2: torch.from_numpy(make_images(spec, size))


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("method", ["tome", "evit"])
def test_degree_zero_is_the_model_itself(make_vit, make_spec, batch, changes, method: Any):
    vit = make_vit(make_spec(**changes))
    if method == "evit" and not changes.get("class_token", True):
        return
    model = CompressedVit(vit, Method(method)).eval()
    images = batch(model.spec)
    with torch.inference_mode():
        assert torch.equal(model(images), vit(images))
        assert torch.equal(model(images, [0] * model.spec.depth), vit(images))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_degree_zero_of_a_model_of_timm(name: str, batch):
    vit = timm.create_model(name, num_classes=5).eval()
    model = CompressedVit(vit).eval()
    images = batch(model.spec, 1)
    with torch.inference_mode():
        assert torch.equal(model(images), vit(images))


@pytest.mark.parametrize("degree", [1, 8, 16, (0, 16, 3, 0)])
@pytest.mark.parametrize(
    "changes", [{}, {"distilled": True}, {"class_token": False, "pool": "avg"}]
)
def test_merging_follows_the_schedule_and_keeps_the_total(
    make_vit, make_spec, batch, changes: dict, degree: Any
):
    model = CompressedVit(make_vit(make_spec(**changes))).eval()
    with torch.inference_mode():
        x, size = model.features(batch(model.spec), degree)
    left = Schedule.of(model.spec, degree).tokens_out[-1]
    assert x.shape == (2, left, model.spec.width)
    assert size is not None
    assert size.sum(dim=1).flatten().tolist() == [model.spec.tokens] * 2
    assert (size[:, : model.spec.prefix] == 1).all()


def test_pruning_follows_the_schedule(make_vit, make_spec, batch):
    model = CompressedVit(make_vit(make_spec()), Method("evit")).eval()
    with torch.inference_mode():
        x, size = model.features(batch(model.spec), 16)
    assert x.shape == (2, 6, 64)
    assert size is None


def slow_logits(vit: Any, image: Tensor, degrees: tuple[int, ...], method: Method) -> Tensor:
    """One image through a plain ViT in float64, as the method is described."""
    vit = copy.deepcopy(vit).double()
    x = torch.cat([vit.cls_token, vit.patch_embed(image[None].double())], dim=1)
    x = (x + vit.pos_embed)[0]  # (N, C)
    size = torch.ones(len(x), dtype=torch.float64)
    for block, degree in zip(vit.blocks, degrees, strict=True):
        count, width = x.shape
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(x))
        q, k, v = qkv.reshape(count, 3, heads, -1).permute(1, 2, 0, 3)  # (H, N, D)
        logits = q @ k.transpose(1, 2) / (width // heads) ** 0.5
        if method.proportional:
            logits = logits + size.log()
        attention = logits.softmax(dim=-1)
        x = x + block.attn.proj((attention @ v).transpose(0, 1).reshape(count, width))
        remove = min(degree, (count - 1) // 2)
        if not remove:
            pass
        elif method.name == "evit":
            order = attention[:, 0, 1:].mean(dim=0).argsort()
            x = x[[0, *(1 + order[remove:].sort().values).tolist()]]
        else:
            key = nn.functional.normalize(k.mean(dim=0), dim=-1)
            a, b = list(range(2, count, 2)), list(range(1, count, 2))
            best, into = (key[a] @ key[b].T).max(dim=1)
            gone = best.argsort(descending=True)[:remove].tolist()
            sums, size = x * size[:, None], size.clone()
            for index in gone:
                target = b[int(into[index])]
                sums[target] += sums[a[index]]
                size[target] += size[a[index]]
            left = [0, *(p for i, p in enumerate(a) if i not in gone), *b]
            x, size = sums[left] / size[left, None], size[left]
        x = x + block.mlp(block.norm2(x))
    return vit.head(vit.norm(x[0]))


@pytest.mark.parametrize("method", [Method("tome"), Method("tome", False), Method("evit")])
@pytest.mark.parametrize("degrees", [(8, 8, 8, 8), (16, 0, 3, 40)])
def test_the_whole_model_is_what_the_method_says(make_vit, make_spec, batch, method, degrees):
    vit = make_vit(make_spec())
    images = batch(make_spec(), 3)
    with torch.no_grad():
        found = CompressedVit(vit, method).eval()(images, degrees)
        expected = torch.stack([slow_logits(vit, image, degrees, method) for image in images])
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-4)


def test_proportional_attention_matters(make_vit, make_spec, batch):
    vit = make_vit(make_spec())
    images = batch(make_spec())
    with torch.inference_mode():
        on, off = (CompressedVit(vit, Method("tome", p)).eval()(images, 8) for p in (True, False))
    assert (on - off).abs().max() > 1e-3


class GapSides:
    """A bank's gap as full matrices beside the weights."""

    def __init__(self, bank: ToComBank, source: int, target: int, scale: float) -> None:
        self.gaps = [bank.gap(layer, source, target, scale) for layer in range(bank.depth)]

    def __call__(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        q, v = (torch.from_numpy(gap).float() for gap in self.gaps[layer])
        return x @ q.T, x @ v.T


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"qkv_bias": False}])
@pytest.mark.parametrize(("source", "target"), [(0, 16), (12, 4)])
def test_side_paths_are_the_merged_weights(
    make_vit, make_spec, make_bank, make_weights, batch, changes: dict, source: int, target: int
):
    spec = make_spec(**changes)
    bank, images = make_bank(spec), batch(spec)
    model = CompressedVit(make_vit(spec)).eval()
    with torch.inference_mode():
        plain = model(images, target)
        beside = model(images, target, GapSides(bank, source, target, 0.1))
        baked = bake(make_weights(spec), spec, bank, Variant.of(spec, target, source=source))
        state = {name: torch.from_numpy(weight) for name, weight in baked.items()}
        model.vit.load_state_dict(state, strict=False)
        merged = model(images, target)
    torch.testing.assert_close(beside, merged, rtol=0, atol=1e-4)
    assert (beside - plain).abs().max() > 0.01


@pytest.mark.parametrize("method", ["tome", "evit"])
def test_the_wrapped_model_is_left_as_it_is(make_vit, make_spec, batch, method: Any):
    vit = make_vit(make_spec())
    classes = [type(module) for module in vit.modules()]
    hooks = [(len(m._forward_hooks), "forward" in vars(m)) for m in vit.modules()]
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    images = batch(make_spec())
    before = vit(images)
    CompressedVit(vit, Method(method))(images, 8)
    assert [type(module) for module in vit.modules()] == classes
    assert [(len(m._forward_hooks), "forward" in vars(m)) for m in vit.modules()] == hooks
    assert list(vit.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in vit.state_dict().items())
    assert torch.equal(vit(images), before)


def test_gradients_reach_every_weight(make_vit, make_spec, batch):
    model = CompressedVit(make_vit(make_spec(layer_scale=True))).train()
    model(batch(model.spec), 8).square().sum().backward()
    for name, parameter in model.vit.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_bfloat16(make_vit, make_spec, batch):
    model = CompressedVit(make_vit(make_spec())).eval()
    images = batch(model.spec)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert model(images, 16).isfinite().all()
    with torch.inference_mode():
        assert model.bfloat16()(images.bfloat16(), 16).dtype == torch.bfloat16


def test_a_wrong_schedule(make_vit, make_spec, batch):
    model = CompressedVit(make_vit(make_spec()))
    with pytest.raises(DegreeError, match=r"4 layers.* not 3"):
        model(batch(model.spec), [1, 2, 3])
    with pytest.raises(DegreeError, match="-1"):
        model(batch(model.spec), -1)


def test_evit_needs_a_class_token(make_vit, make_spec: Callable[..., VitSpec]):
    vit = make_vit(make_spec(class_token=False, pool="avg"))
    with pytest.raises(UnsupportedModelError, match="EViT without a class token"):
        CompressedVit(vit, Method("evit"))


def test_an_unsupported_model_is_refused():
    with torch.device("meta"):
        vit = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(UnsupportedModelError, match="SwinTransformer"):
        CompressedVit(vit)

"""A model's weights for images of another size, held against timm's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import timm
import torch

from tocom_export.errors import InputError
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.model.resizing import list_positions, resize_positions
from tocom_export.model.spec import MOST_PATCHES, VitSpec
from tocom_export.training.building import vit_from_spec


def differ(found: Any, wanted: Any) -> float:
    """The largest difference as a share of the largest value."""
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distilled": True},
        {"registers": 4},
        {"prefix_positions": False},
        {"class_token": False, "pool": "avg"},
        {"image_size": [40, 64]},
        {"patch_size": [8, 14]},
        {"adapter_width": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [(14, 7), (1, 2), (7, 21)], ids=str)
def test_another_image_size_is_timms(
    make_spec: Callable[..., VitSpec], make_weights: Callable, changes: dict, grid: Any
):
    spec = make_spec(depth=1, **changes)
    image_size = (grid[0] * spec.patch_size[0], grid[1] * spec.patch_size[1])
    weights = make_weights(spec)
    resized, found = resize_positions(spec, weights, image_size)
    assert resized == make_spec(depth=1, **{**changes, "image_size": list(image_size)})
    assert {name: array.shape for name, array in found.items()} == resized.weights()
    assert all(found[name] is weights[name] for name in weights if name != "pos_embed")

    vit: Any = vit_from_spec(spec)
    vit.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    vit.set_input_size(img_size=image_size)
    assert differ(found["pos_embed"], vit.pos_embed.detach().numpy()) <= 1e-6


def test_another_image_size_of_a_model_of_timm():
    name, small = "deit_tiny_patch16_224", {"depth": 1, "num_classes": 10}
    vit = timm.create_model(name, **small)
    with torch.no_grad():
        vit.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
    state = vit.state_dict()
    overlay = {"state_dict": state, "num_classes": 10}
    wanted = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=(96, 320), **small
    ).state_dict()
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    spec, found = resize_positions(spec_from_timm(vit, name), arrays, (96, 320))
    assert spec.tokens == 1 + 6 * 20
    assert found.keys() == wanted.keys()
    for key, array in found.items():
        assert differ(array, wanted[key].numpy()) <= (1e-6 if key == "pos_embed" else 0), key


def test_the_same_image_size_changes_nothing(
    make_spec: Callable[..., VitSpec], make_weights: Callable
):
    spec = make_spec(image_size=[60, 56])  # four pixels belong to no patch
    weights = make_weights(spec)
    resized, found = resize_positions(spec, weights, (60, 56))
    assert resized == spec
    assert found.keys() == weights.keys()
    assert all(found[name] is weights[name] for name in weights)


def test_another_image_size_without_weights(make_spec: Callable[..., VitSpec]):
    assert resize_positions(make_spec(), {}, (64, 32)) == (make_spec(image_size=[64, 32]), {})


def test_positions_of_half_precision_are_resized(
    make_spec: Callable[..., VitSpec], make_weights: Callable
):
    spec = make_spec(depth=1)
    weights = {name: array.astype(ml_dtypes.bfloat16) for name, array in make_weights(spec).items()}
    _, found = resize_positions(spec, weights, (64, 64))
    assert found["pos_embed"].dtype == np.float32
    assert np.isfinite(found["pos_embed"]).all()


@pytest.mark.parametrize(
    ("image_size", "near"),
    [((7, 56), "8×56"), ((0, 0), "8×8"), ((56, 61), "56×64"), ((100, 50), "96×48")],
    ids=str,
)
def test_an_image_that_patches_dont_fill(
    make_spec: Callable[..., VitSpec], make_weights: Callable, image_size: Any, near: str
):
    spec = make_spec(depth=1)
    with pytest.raises(InputError) as caught:
        resize_positions(spec, make_weights(spec), image_size)
    assert f"`image_size` {image_size[0]}×{image_size[1]}: small" in str(caught.value)
    assert f"patches of 8×8, which must fill them; {near} would do" in str(caught.value)


@pytest.mark.parametrize("side", [2048 + 8, 999_992])
def test_an_image_of_too_many_patches(make_spec: Callable[..., VitSpec], side: int):
    """Refused before anything of that size is made."""
    spec = make_spec(depth=1)
    assert resize_positions(spec, {}, (2048, 2048))[0].patches == MOST_PATCHES
    with pytest.raises(InputError, match=rf"`image_size` {side}×{side}: that is .* 65,536 is the"):
        resize_positions(spec, {}, (side, side))


def test_sizes_below_zero(make_spec: Callable[..., VitSpec]):
    with pytest.raises(InputError, match="8×8 would do"):
        resize_positions(make_spec(), {}, (-56, -56))


def test_tensors_of_another_model_are_left_to_their_check(
    make_spec: Callable[..., VitSpec], make_weights: Callable
):
    spec = make_spec(depth=1)
    weights = {**make_weights(spec), "pos_embed": np.zeros((1, 7, 64), np.float32)}
    assert resize_positions(spec, weights, (64, 64))[1]["pos_embed"] is weights["pos_embed"]


def test_what_depends_on_the_image_size(make_spec: Callable[..., VitSpec]):
    assert list_positions(make_spec()) == ["pos_embed"]
    tables = make_spec(depth=2, family="beit", positions=False, relative="table")
    assert list_positions(tables) == [
        f"blocks.{layer}.attn.relative_position_bias_table" for layer in (0, 1)
    ]
    computed = make_spec(family="relpos", positions=False, relative="mlp", relative_width=8)
    assert list_positions(computed) == []

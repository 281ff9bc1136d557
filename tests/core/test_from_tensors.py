"""Image size and pooling, read off the shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.errors import CheckpointError, InputError
from tocom_export.loading import load_model
from tocom_export.model.catalogue import known_model
from tocom_export.model.from_tensors import find_image_size, fit_spec
from tocom_export.model.spec import VitSpec

FC_NORM = {"pool": "avg", "final_norm": "fc_norm"}
PREFIXES: list[dict[str, Any]] = [
    {}, {"distilled": True}, {"registers": 4}, {"registers": 2, "prefix_positions": False},
    {"prefix_positions": False}, {"class_token": False, "pool": "avg"},
]  # fmt: skip


@pytest.mark.parametrize("changes", [*PREFIXES, FC_NORM, {"final_norm": "fc_norm"}], ids=str)
def test_tensors_of_the_named_model_change_nothing(
    make_spec: Callable[..., VitSpec], changes: dict[str, Any]
):
    spec = make_spec(**changes)
    pool = spec.pool if spec.final_norm == "fc_norm" else None
    assert fit_spec(spec, spec.weights(), pool=pool) == spec
    assert fit_spec(spec, spec.weights(), spec.image_size, spec.pool) == spec


@pytest.mark.parametrize("changes", PREFIXES, ids=str)
@pytest.mark.parametrize("side", [8, 40, 64, 320])
def test_the_image_size_is_read_off_the_positions(
    make_spec: Callable[..., VitSpec], changes: dict[str, Any], side: int
):
    spec = make_spec(**changes)
    resized = replace(spec, image_size=(side, side))
    assert fit_spec(spec, resized.weights()) == resized
    assert fit_spec(spec, resized.weights(), (side, side)) == resized


def test_an_image_size_may_be_given(make_spec: Callable[..., VitSpec]):
    spec = make_spec(patch_size=[8, 4])
    wide = replace(spec, image_size=(40, 60))  # 5 × 15 patches
    with pytest.raises(InputError) as caught:
        fit_spec(spec, wide.weights())
    assert str(caught.value) == (
        "the weights have positions for 75 patches, which are no square: `image_size` HxW says of "
        "which images."
    )
    assert fit_spec(spec, wide.weights(), (40, 60)) == wide
    assert fit_spec(spec, wide.weights(), (24, 100)).grid == (3, 25)
    assert fit_spec(spec, wide.weights(), (47, 62)) == wide  # patches leave an edge out


TABLES: list[dict[str, Any]] = [
    {"family": "beit", "relative": "table", "positions": False},
    {"family": "beit", "relative": "table", "positions": False, "class_token": False,
     "pool": "avg"},
]  # fmt: skip


@pytest.mark.parametrize("changes", [*PREFIXES, *TABLES], ids=str)
def test_weights_of_another_size_than_is_asked_for(
    make_spec: Callable[..., VitSpec], changes: dict[str, Any]
):
    """The named model's own, then the one that is asked for, then a square."""
    spec = make_spec(**changes)  # 7 × 7 patches
    assert fit_spec(spec, spec.weights(), (80, 80)) == spec
    if spec.positions:
        assert fit_spec(spec, spec.weights(), (8, 8 * 49)) == spec
    for size in ((80, 80), (24, 24), (8, 8)):
        square = replace(spec, image_size=size)
        assert fit_spec(spec, square.weights()) == square
        assert fit_spec(spec, square.weights(), (56, 56)) == square
        assert fit_spec(spec, square.weights(), (40, 72)) == square
    wide = replace(spec, image_size=(24, 40))
    assert fit_spec(spec, wide.weights(), (24, 40)) == wide
    with pytest.raises(InputError) as caught:
        fit_spec(spec, wide.weights(), (56, 56))
    what = "15 patches" if spec.positions else "45 distances of two patches"
    assert str(caught.value) == (
        f"the weights have positions for {what}, which are no square, nor images of 56x56: "
        "`image_size` HxW says of which images. To resample them, build at that size, then "
        "again of the bundle's weights.safetensors."
    )
    with pytest.raises(InputError, match=f"{what}, which are no square: `image_size` HxW says"):
        fit_spec(spec, wide.weights())
    assert fit_spec(spec, spec.weights(), (63, 60)) == spec


@pytest.mark.parametrize("size", [(0, 0), (-56, -56), (3, 56), (-8, 8)])
def test_images_that_hold_no_patch(make_spec: Callable[..., VitSpec], size: tuple[int, int]):
    """They are no size that weights could be for."""
    spec = make_spec()
    square = replace(spec, image_size=(80, 80))
    assert fit_spec(spec, square.weights(), size) == square


def test_sizes_of_positions_alone(make_spec: Callable[..., VitSpec]):
    """Rotary positions don't say what they are of; a width of another model says nothing."""
    spec = make_spec(positions=False, rotary={"kind": "cat"}, family="eva")
    assert find_image_size(spec, spec.weights(), (80, 80)) == (56, 56)
    other = make_spec(width=32, image_size=[80, 80])
    assert find_image_size(make_spec(), other.weights()) == (56, 56)
    assert find_image_size(make_spec(), {**make_spec().weights(), "pos_embed": (1, 0, 64)}) is None


@pytest.mark.parametrize("other", [{"distilled": True}, {"registers": 3}, FC_NORM])
def test_tensors_of_another_model_are_left_to_their_check(
    make_spec: Callable[..., VitSpec], other: dict[str, Any]
):
    """A distillation token more is no image of another size."""
    spec, shapes = make_spec(), make_spec(**other).weights()
    assert fit_spec(spec, shapes).image_size == spec.image_size
    assert fit_spec(spec, {}) == spec
    assert fit_spec(spec, {**shapes, "pos_embed": (50, 64)}).image_size == spec.image_size


@pytest.mark.parametrize("changes", [{}, {"registers": 4}])
def test_the_pooling_is_read_off_the_last_norm(
    make_spec: Callable[..., VitSpec], changes: dict[str, Any]
):
    token = make_spec(**changes)
    average = make_spec(**changes, **FC_NORM)
    assert fit_spec(token, average.weights()) == average
    assert fit_spec(token, average.weights(), pool="avg") == average
    assert fit_spec(token, average.weights(), pool="token") == replace(average, pool="token")
    assert fit_spec(token, token.weights(), pool="avg") == replace(token, pool="avg")
    with pytest.raises(InputError, match=r"an fc_norm, but .* have a norm.*`pool` says"):
        fit_spec(average, token.weights())
    assert fit_spec(average, token.weights(), pool="token") == token
    assert fit_spec(average, token.weights(), pool="avg") == replace(token, pool="avg")


def test_a_pooling_that_the_model_lacks(make_spec: Callable[..., VitSpec]):
    spec = make_spec(class_token=False, pool="avg")
    with pytest.raises(InputError, match="pool 'token' needs a class token"):
        fit_spec(spec, spec.weights(), pool="token")


@pytest.mark.parametrize("told", [False, True])
def test_images_that_patches_dont_fill(tmp_path: Path, told: bool):
    """They are refused whether or not the file says what it is of."""
    spec = known_model("vit_tiny_patch16_224")[0]
    spec = replace(spec, classes=3)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in spec.weights().items()}
    metadata = to_metadata(ModelInfo(spec)) if told else None
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    model = None if told else spec.model
    with pytest.raises(InputError, match=r"230×230.* must fill them; 224×224 would do"):
        load_model(model, tmp_path / "x.safetensors", image_size=230)


def test_metadata_of_more_layers_than_tensors(make_spec: Callable[..., VitSpec], tmp_path: Path):
    """Their names aren't made."""
    spec = make_spec()
    tensors = {name: np.zeros(shape, np.float32) for name, shape in spec.weights().items()}
    deep = to_metadata(ModelInfo(replace(spec, depth=10**6)))
    save_file(tensors, tmp_path / "x.safetensors", deep)
    with pytest.raises(CheckpointError, match="metadata say 1000000 layers, but it has 56 tensors"):
        load_model(checkpoint=tmp_path / "x.safetensors", image_size=64)

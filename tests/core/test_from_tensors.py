"""Image size and pooling, read off the shapes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tocom_export.errors import InputError
from tocom_export.model.from_tensors import fit_spec
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
    ragged = replace(spec, image_size=(47, 62))  # timm's patches leave an edge out
    assert fit_spec(spec, wide.weights(), (47, 62)) == ragged


def test_another_image_size_than_the_positions_is_refused(make_spec: Callable[..., VitSpec]):
    spec = make_spec()
    with pytest.raises(InputError) as caught:
        fit_spec(spec, replace(spec, image_size=(80, 80)).weights(), (56, 56))
    assert str(caught.value) == (
        "`image_size` 56x56 is 49 patches, but the weights have positions for 100 patches, images "
        "of 80x80. They are not resampled here; finetune does that."
    )
    with pytest.raises(InputError, match=r"positions for 15 patches\. They are not"):
        fit_spec(spec, replace(spec, image_size=(24, 40)).weights(), (56, 56))


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

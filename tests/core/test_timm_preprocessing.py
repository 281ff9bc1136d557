"""Each pretrained model of timm's that is supported sees the pixels that timm would show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import create_transform, resolve_data_config

from tocom_export.model.catalogue import is_known, known_model
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.data.transforms import eval_transform
from tocom_export.training.timm_models import preprocess_of_name

NAMES = [name for name in timm.list_pretrained() if is_known(name)]


def config_of(name: str) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    return resolve_data_config({}, pretrained_cfg=cfg.to_dict())


def group() -> dict[tuple[Any, ...], tuple[VitSpec, Preprocess, dict[str, Any]]]:
    """What differs among the tags in pixels: a few dozens of some hundreds."""
    found = {}
    for name in NAMES:
        (spec, preprocess), config = known_model(name), config_of(name)
        key = (spec.image_size, preprocess, *sorted(config.items()))
        found[key] = (spec, preprocess, config)
    return found


def test_there_are_tags_of_both_crops():
    crops = [config_of(name)["crop_mode"] for name in NAMES]
    assert len(crops) > 200
    assert {*crops} == {"center", "squash"}


def test_the_list_says_what_timm_says():
    for name in NAMES:
        assert known_model(name)[1] == preprocess_of_name(name), name


@pytest.mark.parametrize("size", [(70, 230), (311, 120)], ids=["tall", "wide"])
def test_the_same_pixels_as_timm(tmp_path: Path, size: tuple[int, int]):
    coarse = np.random.default_rng(1).integers(0, 256, (5, 6, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.png")
    for spec, preprocess, config in group().values():
        wanted = create_transform(**config)(image).numpy()  # (3, H, W)
        found = preprocess.load(tmp_path / "a.png", spec.image_size)
        assert found.shape == wanted.shape, config
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=str(config))
        assert np.array_equal(eval_transform(spec, preprocess)(image), wanted), config

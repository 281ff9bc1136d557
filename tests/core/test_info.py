from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tocom_export.compression.metadata import METADATA_KEY, ModelInfo
from tocom_export.compression.method import Method
from tocom_export.errors import InputError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec


@pytest.mark.parametrize("method", [Method("tome"), Method("tome", False), Method("evit")])
def test_comes_back(make_spec: Callable[..., VitSpec], method: Method):
    info = ModelInfo(make_spec(), 16, method, ("cat", "dog"), Preprocess(crop_pct=0.9))
    assert ModelInfo.from_metadata(info.to_metadata()) == info


def test_what_is_not_known_stays_unknown():
    assert ModelInfo.from_metadata(ModelInfo().to_metadata()) == ModelInfo()
    assert ModelInfo.from_metadata({"format": "pt"}) == ModelInfo()


def test_source_zero_is_known():
    assert ModelInfo.from_metadata(ModelInfo(source=0).to_metadata()).source == 0


def test_one_metadata_key():
    assert list(ModelInfo(source=3).to_metadata()) == [METADATA_KEY]


@pytest.mark.parametrize(
    "data",
    [
        [],
        3,
        "text",
        {"source": 17},
        {"source": -1},
        {"source": 1.0},
        {"source": True},
        {"source": "0"},
        {"method": "topk"},
        {"classes": 3},
        {"classes": "cat"},
        {"spec": 3},
        {"spec": {"model": "m"}},
        {"preprocess": {"mean": [0.5]}},
        {"preprocess": [1]},
    ],
)
def test_bad_metadata(data: Any):
    with pytest.raises(InputError):
        ModelInfo.from_metadata({METADATA_KEY: json.dumps(data)})


def test_metadata_that_is_not_json():
    with pytest.raises(InputError, match=METADATA_KEY):
        ModelInfo.from_metadata({METADATA_KEY: "{"})

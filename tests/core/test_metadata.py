from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tocom_export.compression.bank import BankInfo
from tocom_export.compression.metadata import (
    METADATA_KEY,
    ModelInfo,
    from_metadata,
    to_metadata,
)
from tocom_export.compression.method import Method
from tocom_export.errors import InputError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec


@pytest.mark.parametrize("method", [Method("tome"), Method("tome", False), Method("evit")])
def test_comes_back(make_spec: Callable[..., VitSpec], method: Method):
    info = ModelInfo(make_spec(), 16, method, ("cat", "dog"), Preprocess(crop_pct=0.9))
    assert from_metadata(ModelInfo, to_metadata(info)) == info


def test_what_is_not_known_stays_unknown():
    assert from_metadata(ModelInfo, to_metadata(ModelInfo())) == ModelInfo()
    assert from_metadata(ModelInfo, {"format": "pt"}) == ModelInfo()


def test_the_variant_that_a_file_is_of():
    info = ModelInfo(variant="r08")
    assert from_metadata(ModelInfo, to_metadata(info)) == info


def test_source_zero_is_known():
    assert from_metadata(ModelInfo, to_metadata(ModelInfo(source=0))).source == 0


def test_one_metadata_key():
    assert list(to_metadata(ModelInfo(source=3))) == [METADATA_KEY]


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
        {"method": "tome"},
        {"method": {"name": "topk"}},
        {"method": {}},
        {"method": {"name": "tome", "proportional": 1}},
        {"classes": 3},
        {"classes": "cat"},
        {"classes": [3]},
        {"spec": 3},
        {"spec": {"model": "m"}},
        {"preprocess": {"mean": [0.5]}},
        {"preprocess": [1]},
        {"sauce": 8},
        {"preprocess": {"size": 224}},
    ],
)
def test_bad_metadata(data: Any):
    with pytest.raises(InputError, match=METADATA_KEY):
        from_metadata(ModelInfo, {METADATA_KEY: json.dumps(data)})


def test_what_must_be_there():
    with pytest.raises(InputError, match=rf"'{METADATA_KEY}'.*method"):
        from_metadata(BankInfo, {"format": "pt"})
    info = BankInfo(Method("tome", False), "m", "shared")
    assert from_metadata(BankInfo, to_metadata(info)) == info


def test_what_is_written():
    """A file that is written again is the same to the byte."""
    info = ModelInfo(source=8, method=Method("tome"), classes=("a", "b"))
    method = '{"name": "tome", "proportional": true}'
    text = f'{{"classes": ["a", "b"], "method": {method}, "source": 8}}'
    assert to_metadata(info) == {METADATA_KEY: text}


def test_metadata_that_is_not_json():
    with pytest.raises(InputError, match=METADATA_KEY):
        from_metadata(ModelInfo, {METADATA_KEY: "{"})

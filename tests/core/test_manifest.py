from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from tocom_export.bundle.file_hashes import FileRecord
from tocom_export.bundle.manifest import (
    WEIGHTS,
    Manifest,
    graph_name,
    plan_name,
    weights_name,
)
from tocom_export.compression.method import Method
from tocom_export.errors import DegreeError, InputError
from tocom_export.io.json_codec import decode, encode
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant

RECORD = FileRecord("0" * 64, 3)
DIGEST = {"sha256": "0" * 64, "bytes": 3}


@pytest.fixture
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(depth=2, classes=3)


@pytest.fixture
def manifest(spec: VitSpec) -> Manifest:
    variants = (Variant.of(spec, 8), Variant.of(spec, [20, 3], "fast", compensated=False))
    return Manifest(
        spec=spec,
        method=Method("tome"),
        precision="fp32",
        variants={variant.name: variant for variant in variants},
        files=dict.fromkeys((WEIGHTS, "r08.onnx", "r08.safetensors", "fast.onnx"), RECORD),
        preprocess=Preprocess(),
        tools={"tocom-export": "1"},
    )


def test_files_are_called_after_their_variant():
    names = [name("fast") for name in (graph_name, weights_name, plan_name)]
    assert names == ["fast.onnx", "fast.safetensors", "fast.plan"]


def test_what_is_written(manifest: Manifest):
    assert encode(manifest) == {
        "spec": encode(manifest.spec),
        "method": {"name": "tome", "proportional": True},
        "precision": "fp32",
        "variants": {
            "r08": {
                "name": "r08",
                "degrees": [8, 8],
                "targets": [8, 8],
                "source": 0,
                "scale": 0.1,
                "compensated": True,
            },
            "fast": {
                "name": "fast",
                "degrees": [20, 3],
                "targets": [16, 16],
                "source": 0,
                "scale": 0.1,
                "compensated": False,
            },
        },
        "files": dict.fromkeys(manifest.files, DIGEST),
        "preprocess": encode(manifest.preprocess),
        "tools": {"tocom-export": "1"},
        "plans": [],
        "refitted": [],
        "accuracy": {},
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classes": ("cat", "dog", "owl")},
        {"plans": ("fast",), "refitted": ("r08", "fast")},
        {"accuracy": {"r08": 81.25, "fast": 0, "r00": 100}},
        {"method": Method("tome", False), "precision": "bf16"},
        {"preprocess": Preprocess(crop_pct=0.9)},
    ],
)
def test_comes_back(manifest: Manifest, changes: dict[str, Any]):
    if "r00" in changes.get("accuracy", ()):
        with pytest.raises(InputError, match="r00 is no variant"):
            dataclasses.replace(manifest, **changes)
        del changes["accuracy"]["r00"]
    changed = dataclasses.replace(manifest, **changes)
    assert decode(Manifest, json.loads(json.dumps(encode(changed)))) == changed


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "x/", "-x"])
def test_a_file_elsewhere(manifest: Manifest, name: str):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(manifest, files={**manifest.files, name: RECORD})
    assert str(caught.value) == f"{name!r} is not a plain file name."


@pytest.mark.parametrize("name", [WEIGHTS, "r08.onnx", "fast.onnx"])
def test_a_file_that_is_not_listed(manifest: Manifest, name: str):
    files = {listed: record for listed, record in manifest.files.items() if listed != name}
    with pytest.raises(InputError, match=f"{name} is not listed"):
        dataclasses.replace(manifest, files=files)


def test_own_weights_need_not_be_listed(manifest: Manifest):
    """A variant at its source has none."""
    files = {name: record for name, record in manifest.files.items() if name != "r08.safetensors"}
    assert dataclasses.replace(manifest, files=files).files == files


def test_a_variant_under_another_name(manifest: Manifest):
    variants = {"r08": manifest.variants["r08"], "fast": manifest.variants["r08"]}
    with pytest.raises(InputError, match="variants: fast calls itself r08"):
        dataclasses.replace(manifest, variants=variants)


def test_a_variant_of_another_model(manifest: Manifest, make_spec: Callable[..., VitSpec]):
    with pytest.raises(DegreeError, match="3 layers; a degree is needed for each, not 2"):
        dataclasses.replace(manifest, spec=make_spec(depth=3, classes=3))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_another_number_of_class_names(manifest: Manifest, count: int):
    with pytest.raises(InputError, match=f"{count} names of 3 classes"):
        dataclasses.replace(manifest, classes=("owl",) * count)


@pytest.mark.parametrize(
    "changes", [{"plans": ("r16",)}, {"refitted": ("r16",)}, {"accuracy": {"r16": 80.0}}]
)
def test_something_of_no_variant(manifest: Manifest, changes: dict[str, Any]):
    with pytest.raises(InputError, match="r16 is no variant"):
        dataclasses.replace(manifest, **changes)

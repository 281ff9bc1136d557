from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.bundle.manifest import MANIFEST, WEIGHTS
from tocom_export.bundle.opening import Bundle, read_manifest
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.errors import BundleError, CheckpointError, DegreeError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant


@pytest.fixture
def blueprint(tmp_path: Path, make_blueprint: Callable[..., Blueprint], make_spec) -> Blueprint:
    spec = make_spec(depth=2, width=16, heads=2, mlp_width=32, classes=3)
    changes = {"preprocess": Preprocess(crop_pct=0.9), "classes": ("cat", "dog", "owl")}
    return make_blueprint(
        tmp_path,
        spec,
        **changes,
        source=8,
        method=Method("tome", False),
        schedules={"fast": [20, 3]},
    )


@pytest.fixture
def built(tmp_path: Path, blueprint: Blueprint) -> Bundle:
    return write_bundle(blueprint, tmp_path / "bundle")


def refused(path: Path, *, hashes: bool = False) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, hashes=hashes)
    assert str(path) in str(caught.value)
    return str(caught.value)


def edit(bundle: Bundle, change: Callable[[dict[str, Any]], Any]) -> None:
    file = bundle.path / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def test_what_was_built_is_opened(built: Bundle, blueprint: Blueprint):
    opened = Bundle.open(built.path, hashes=True)
    assert opened == built
    assert isinstance(opened.spec, VitSpec)
    assert opened.spec == blueprint.weights.spec
    assert opened.method == Method("tome", False)
    assert opened.precision == "fp32"
    assert opened.variants == {
        "r00": Variant("r00", (0, 0), (0, 0), 8, 0.1, True),
        "r08": Variant("r08", (8, 8), (8, 8), 8, 0.1, True),
        "r16": Variant("r16", (16, 16), (16, 16), 8, 0.1, True),
        "fast": Variant("fast", (20, 3), (16, 16), 8, 0.1, True),
    }
    assert list(opened.variants) == ["r00", "r08", "r16", "fast"]
    assert opened.variants["r16"].schedule(opened.spec).tokens_out == (34, 18)
    assert opened.preprocess == Preprocess(crop_pct=0.9)
    assert opened.classes == ("cat", "dog", "owl")


def test_a_manifest_alone(built: Bundle):
    manifest = read_manifest(built.path)
    for field in dataclasses.fields(manifest):
        assert getattr(manifest, field.name) == getattr(built, field.name)


def test_a_path_may_be_text(built: Bundle):
    assert Bundle.open(str(built.path)) == built


def test_every_other_file_is_recorded(built: Bundle):
    assert {p.name for p in built.path.iterdir()} == {MANIFEST, *built.files}


@pytest.mark.parametrize("name", [0, "0", "00", "r00"])
def test_where_a_variant_lies(built: Bundle, name: str | int):
    assert built.variant(name) == built.variants["r00"]
    assert built.graph(name) == built.path / "r00.onnx"
    assert built.weight_files(name) == [built.path / WEIGHTS, built.path / "r00.safetensors"]


def test_a_variant_at_its_source_has_no_weights_of_its_own(built: Bundle):
    assert built.weight_files("fast") == [built.path / WEIGHTS, built.path / "fast.safetensors"]
    assert built.weight_files(8) == [built.path / WEIGHTS]
    shared, own = built.tensors(8), built.tensors("fast")
    assert shared.keys() == own.keys() == built.spec.weights().keys()
    changed = {n for n, tensor in own.items() if not np.array_equal(tensor, shared[n])}
    assert changed == {f"blocks.{layer}.attn.qkv.weight" for layer in range(2)}


@pytest.mark.parametrize("name", [4, "4", "r04", "Fast", "-1", -1, "", "r8"])
def test_no_such_variant(built: Bundle, name: str | int):
    for look in (built.variant, built.graph, built.weight_files, built.tensors, built.plan):
        with pytest.raises(DegreeError) as caught:
            look(name)
        assert str(caught.value) == (
            f"{built.path} has no variant {name}; it has r00, r08, r16, fast."
        )


def test_plans(built: Bundle):
    with pytest.raises(DegreeError, match=r"no plan for r08 \(plans: none\)"):
        built.plan(8)
    planned = dataclasses.replace(built, plans=("r16", "fast"))
    assert planned.plan(16) == built.path / "r16.plan"
    assert planned.plan("fast") == built.path / "fast.plan"
    with pytest.raises(DegreeError, match=r"no plan for r08 \(plans: r16, fast\)"):
        planned.plan("r08")


def test_size(built: Bundle):
    files = [file for file in built.path.iterdir() if file.name != MANIFEST]
    assert built.size() == sum(file.stat().st_size for file in files)
    (built.path / "r16.plan").write_bytes(bytes(1000))
    assert dataclasses.replace(built, plans=("r16",)).size() == built.size() + 1000


def test_missing_folder(tmp_path: Path):
    assert "not a bundle" in refused(tmp_path / "none")


def test_not_a_bundle(tmp_path: Path):
    assert MANIFEST in refused(tmp_path)


def test_a_file_is_not_a_bundle(tmp_path: Path):
    (tmp_path / "file").touch()
    assert "not a bundle" in refused(tmp_path / "file")


@pytest.mark.parametrize("name", [WEIGHTS, "r00.onnx", "r16.safetensors"])
def test_missing_file(built: Bundle, name: str):
    (built.path / name).unlink()
    message = refused(built.path)
    assert name in message
    assert "missing" in message


@pytest.mark.parametrize("name", [WEIGHTS, "r08.onnx", "r16.safetensors"])
def test_a_file_of_another_size(built: Bundle, name: str):
    file = built.path / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    message = refused(built.path)
    for part in (name, str(size), str(size - 1)):
        assert part in message


@pytest.mark.parametrize("name", [WEIGHTS, "r08.onnx", "r16.safetensors"])
def test_a_changed_byte(built: Bundle, name: str):
    file = built.path / name
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert Bundle.open(built.path) == built
    message = refused(built.path, hashes=True)
    assert name in message
    assert "SHA-256" in message


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "x/", "a\0b"])
def test_a_file_name_that_leaves_the_bundle(built: Bundle, name: str):
    edit(built, lambda m: m["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    message = refused(built.path)
    assert repr(name) in message


@pytest.mark.parametrize("name", [WEIGHTS, "r08.onnx"])
def test_a_file_that_the_manifest_leaves_out(built: Bundle, name: str):
    edit(built, lambda m: m["files"].pop(name))
    assert name in refused(built.path)


def test_a_format_of_the_future(built: Bundle):
    edit(built, lambda m: m.update(format=3))
    message = refused(built.path)
    assert "format 3" in message
    assert "reads 2" in message


def test_a_format_of_the_past(built: Bundle):
    edit(built, lambda m: m.update(format=1, targets={"0": [50, 50]}, source=8))
    assert "format 1, 2 is expected); build it again" in refused(built.path)


FIELDS = ("format", "spec", "method", "precision", "variants", "files", "preprocess", "tools")


@pytest.mark.parametrize("field", FIELDS)
def test_missing_field(built: Bundle, field: str):
    edit(built, lambda m: m.pop(field))
    assert MANIFEST in refused(built.path)


@pytest.mark.parametrize("field", ["name", "degrees", "targets", "source", "scale", "compensated"])
def test_missing_field_of_a_variant(built: Bundle, field: str):
    edit(built, lambda m: m["variants"]["r08"].pop(field))
    assert f"missing required field {field}" in refused(built.path)


def test_what_may_be_left_out(built: Bundle):
    edit(built, lambda m: m.pop("classes"))
    assert Bundle.open(built.path) == dataclasses.replace(built, classes=None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("spec", {}, "missing required field"),
        ("spec", 3, "spec: expected object, got int"),
        ("method", "tome", "method: expected object, got str"),
        ("method", {"name": "topk"}, "method.name: invalid enum value 'topk'"),
        ("precision", "fp8", "precision: invalid enum value 'fp8'"),
        ("variants", ["r00", "r08"], "variants: expected object, got array"),
        ("variants", {"r00": [50]}, "expected object, got array"),
        ("files", ["weights.safetensors"], "files: expected object, got array"),
        ("files", {"weights.safetensors": 3}, "expected object, got int"),
        (
            "files",
            {"weights.safetensors": {"sha256": "0", "bytes": -1}},
            "bytes: expected int >= 0",
        ),
        ("preprocess", [1], "preprocess: expected object, got array"),
        ("preprocess", {"size": 224}, "preprocess.size: no such field"),
        ("classes", 3, "classes: expected array"),
        ("classes", "owl", "classes: expected array"),
        ("classes", ["cat", "dog"], "classes: 2 names of 3 classes"),
        ("tools", 3, "tools: expected object, got int"),
        ("plans", ["r04"], "r04 is no variant"),
        ("plans", [8], "plans[0]: expected str, got int"),
        ("refitted", ["r04"], "r04 is no variant"),
        ("refitted", {"r08": {}}, "refitted: expected array"),
        ("planes", ["r08"], "planes: no such field"),
    ],
)
def test_bad_field(built: Bundle, field: str, value: Any, message: str):
    edit(built, lambda m: m.update({field: value}))
    found = refused(built.path)
    assert f"{built.path / MANIFEST} can't be understood" in found
    assert message in found


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "r16", "r16 is the name of degree 16 in each layer"),
        ("name", "quick", "variants: r08 calls itself quick"),
        ("name", "../r08", "'../r08' can't name a variant"),
        ("name", 8, "name: expected str, got int"),
        ("degrees", [8], "a degree and a target are needed for each layer"),
        ("degrees", 8, "degrees: expected array, got int"),
        ("degrees", [8, 7], "r08 is the name of degree 8 in each layer"),
        ("degrees", [8, -8], "degrees[1]: expected int >= 0"),
        ("degrees", [8, "8"], "degrees[1]: expected int, got str"),
        ("targets", [8], "a degree and a target are needed for each layer"),
        ("targets", [8, 16.5], "targets[1]: expected float <= 16.0"),
        ("targets", [8, -1], "targets[1]: expected float >= 0.0"),
        ("targets", [8, None], "targets[1]: expected float, got null"),
        ("source", "x", "source: expected int, got str"),
        ("source", 17, "source: expected int <= 16"),
        ("source", 4.0, "source: expected int, got float"),
        ("scale", None, "scale: expected float, got null"),
        ("scale", -1, "`scale` -1: 0 to 1000 is expected"),
        ("scale", 1001, "`scale` 1001: 0 to 1000 is expected"),
        ("compensated", 1, "compensated: expected bool, got int"),
        ("tokens", [42, 34], "variants[r08].tokens: no such field"),
    ],
)
def test_bad_field_of_a_variant(built: Bundle, field: str, value: Any, message: str):
    edit(built, lambda m: m["variants"]["r08"].update({field: value}))
    found = refused(built.path)
    assert f"{built.path / MANIFEST} can't be understood" in found
    assert message in found


def test_a_variant_of_another_number_of_layers(built: Bundle):
    three = {"degrees": [8] * 3, "targets": [8] * 3}
    edit(built, lambda m: m["variants"]["r08"].update(three))
    assert "2 layers; a degree is needed for each, not 3" in refused(built.path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[" * 100_000, "\xff", '{"format": NaN}', '{"a": 1e999}'],
    ids=["empty", "open", "list", "number", "null", "deep", "latin-1", "NaN", "infinite"],
)  # fmt: skip
def test_a_manifest_that_is_none(built: Bundle, text: str):
    (built.path / MANIFEST).write_text(text, "latin-1")
    assert MANIFEST in refused(built.path)


def test_a_huge_manifest(built: Bundle):
    (built.path / MANIFEST).write_bytes(b" " * 10_000_001)
    assert "more than 10000000 bytes" in refused(built.path)


def test_recorded_accuracy(built: Bundle):
    assert built.accuracy == {}
    recorded = dataclasses.replace(built, accuracy={"r00": 81.25, "r16": 79.9})
    recorded.save_manifest()
    assert json.loads((built.path / MANIFEST).read_text())["accuracy"] == {
        "r00": 81.25,
        "r16": 79.9,
    }
    assert Bundle.open(built.path) == recorded


def test_a_manifest_without_recorded_accuracy(built: Bundle):
    assert json.loads((built.path / MANIFEST).read_text())["accuracy"] == {}
    edit(built, lambda m: m.pop("accuracy"))
    assert Bundle.open(built.path) == built


@pytest.mark.parametrize(
    "value",
    [
        {"r04": 80.0},
        {"8": 80.0},
        {"r08": "high"},
        {"r08": None},
        {"r08": 100.1},
        {"r08": -1},
        {"x": 80.0},
        [80.0],
        3,
    ],
)
def test_bad_accuracy(built: Bundle, value: Any):
    edit(built, lambda m: m.update(accuracy=value))
    assert MANIFEST in refused(built.path)


def test_a_newer_format(built: Bundle):
    edit(built, lambda m: m.update(format=3))
    assert "is of format 3, and tocom-export" in (message := refused(built.path))
    assert message.endswith("pip install -U tocom-export.")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_pipe_is_not_waited_for(built: Bundle, name: str):
    (built.path / name).unlink()
    os.mkfifo(built.path / name)
    if name == MANIFEST:
        assert f"{MANIFEST}: can't be read: it is a pipe or a device" in refused(built.path)
        return
    with pytest.raises(CheckpointError, match="can't be read: it is a pipe or a device"):
        Checkpoint.open(built.path / name)


def test_a_bundle_that_a_killed_writer_had_moved_away(built: Bundle):
    built.path.rename(built.path.with_name(f".{built.path.name}.0123abcd.old"))
    assert Bundle.open(built.path, hashes=True) == built
    assert [file.name for file in built.path.parent.glob(".*")] == []

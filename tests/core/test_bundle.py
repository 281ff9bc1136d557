from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tocom_export.bundle.file_hashes import record_files
from tocom_export.bundle.opening import MANIFEST, WEIGHTS, Bundle, Refitted
from tocom_export.bundle.writing import BuildPlan, write_bundle
from tocom_export.compression.method import Method
from tocom_export.errors import BundleError, DegreeError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec


@pytest.fixture
def plan(tmp_path: Path, make_plan: Callable[..., BuildPlan], make_spec) -> BuildPlan:
    spec = make_spec(depth=2, width=16, heads=2, mlp_width=32, classes=3)
    changes = {"preprocess": Preprocess(crop_pct=0.9), "classes": ("cat", "dog", "owl")}
    return make_plan(tmp_path, spec, **changes, source=8, method=Method("tome", False))


@pytest.fixture
def built(tmp_path: Path, plan: BuildPlan) -> Bundle:
    return write_bundle(plan, tmp_path / "bundle")


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


def test_what_was_built_is_opened(built: Bundle, plan: BuildPlan):
    opened = Bundle.open(built.path, hashes=True)
    assert opened == built
    assert isinstance(opened.spec, VitSpec)
    assert opened.spec == plan.spec
    assert opened.method == Method("tome", False)
    assert (opened.source, opened.scale, opened.compensated) == (8, 0.1, True)
    assert opened.precision == "fp32"
    assert opened.targets == {0: (50, 50), 8: (42, 34), 16: (34, 18)}
    assert opened.preprocess == Preprocess(crop_pct=0.9)
    assert opened.classes == ("cat", "dog", "owl")


def test_every_other_file_is_recorded(built: Bundle):
    assert {p.name for p in built.path.iterdir()} == {MANIFEST, *built.files}


def test_where_a_target_lies(built: Bundle):
    assert built.graph(0) == built.path / "r00.onnx"
    assert built.weight_files(0) == [built.path / WEIGHTS, built.path / "r00.safetensors"]
    assert built.weight_files(8) == [built.path / WEIGHTS]


def test_no_such_target(built: Bundle):
    with pytest.raises(DegreeError, match=r"target 4.*0, 8, 16"):
        built.graph(4)


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
    edit(built, lambda m: m.update(format=2))
    message = refused(built.path)
    assert "format 2" in message
    assert "reads 1" in message


FIELDS = (
    "format", "spec", "method", "proportional", "source", "scale", "compensated", "precision",
    "targets", "files", "preprocess", "classes", "tools",
)  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_missing_field(built: Bundle, field: str):
    edit(built, lambda m: m.pop(field))
    assert MANIFEST in refused(built.path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spec", {}),
        ("spec", 3),
        ("method", "topk"),
        ("source", "x"),
        ("scale", None),
        ("targets", [0, 8]),
        ("targets", {"x": [1]}),
        ("targets", {"0": 50}),
        ("files", ["weights.safetensors"]),
        ("files", {"weights.safetensors": 3}),
        ("preprocess", {}),
        ("preprocess", [1]),
        ("classes", 3),
        ("tools", 3),
    ],
)
def test_bad_field(built: Bundle, field: str, value: Any):
    edit(built, lambda m: m.update({field: value}))
    assert MANIFEST in refused(built.path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[" * 100_000, "\xff"],
    ids=["empty", "open", "list", "number", "null", "deep", "latin-1"],
)  # fmt: skip
def test_a_manifest_that_is_none(built: Bundle, text: str):
    (built.path / MANIFEST).write_text(text, "latin-1")
    assert MANIFEST in refused(built.path)


def test_a_huge_manifest(built: Bundle):
    (built.path / MANIFEST).write_bytes(b" " * 10_000_001)
    assert "too large" in refused(built.path)


def test_recorded_accuracy(built: Bundle):
    assert built.accuracy == {}
    recorded = dataclasses.replace(built, accuracy={0: 81.25, 16: 79.9})
    recorded.save_manifest()
    assert json.loads((built.path / MANIFEST).read_text())["accuracy"] == {"0": 81.25, "16": 79.9}
    assert Bundle.open(built.path) == recorded


def test_a_manifest_without_recorded_accuracy(built: Bundle):
    edit(built, lambda m: m.pop("accuracy"))
    assert Bundle.open(built.path) == built


@pytest.mark.parametrize("value", [{"4": 80.0}, {"8": "high"}, {"8": None}, {"x": 80.0}, [80.0], 3])
def test_bad_accuracy(built: Bundle, value: Any):
    edit(built, lambda m: m.update(accuracy=value))
    assert MANIFEST in refused(built.path)


@pytest.fixture(params=["same size", "larger"])
def refit(built: Bundle, tmp_path: Path, request) -> tuple[Bundle, Path]:
    """What the bundle is about to become, announced in its manifest, and r16's file for it."""
    name = "r16.safetensors"
    (tmp_path / "new").mkdir()
    raw = bytearray((built.path / name).read_bytes())
    raw[-1] ^= 1
    beside = tmp_path / "new" / name
    beside.write_bytes(raw + (b"" if request.param == "same size" else b"more"))
    later = dataclasses.replace(
        built,
        files={**built.files, **record_files(beside.parent, [name])},
        refitted={16: Refitted(4, 0.2, compensated=True)},
        accuracy={0: 81.25},
    )
    built = dataclasses.replace(built, accuracy={0: 81.25, 16: 79.9})
    built.save_manifest(later=later)
    return later, beside


def test_a_refit_broken_off_before_its_file_was_renamed(built: Bundle, refit):
    opened = Bundle.open(built.path, hashes=True)
    assert opened == dataclasses.replace(built, accuracy={0: 81.25, 16: 79.9})


def test_a_refit_broken_off_after_its_file_was_renamed(refit):
    later, beside = refit
    shutil.copy(beside, later.path)
    opened = Bundle.open(later.path, hashes=True)
    assert opened == later
    opened.save_manifest()
    assert "next" not in json.loads((later.path / MANIFEST).read_text())
    assert Bundle.open(later.path, hashes=True) == later


def test_a_file_that_is_neither_before_nor_after_a_refit(built: Bundle, refit):
    file = built.path / "r16.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-2] + b"??")
    message = refused(built.path, hashes=True)
    assert "r16.safetensors" in message
    assert "SHA-256" in message
    file.unlink()
    assert "r16.safetensors is missing" in refused(built.path)


def test_a_refit_that_is_over(refit):
    later, beside = refit
    shutil.copy(beside, later.path)
    later.save_manifest()
    assert Bundle.open(later.path, hashes=True) == later


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(next={}),
        lambda m: m.update(next=None),
        lambda m: m.update(next=3),
        lambda m: m.update(next=[m["next"]]),
        lambda m: m["next"].pop("files"),
        lambda m: m["next"].update(format=2),
        lambda m: m["next"].update(refitted={"5": {"source": 0, "scale": 0.1}}),
        lambda m: m["next"]["files"].update({"../x": {"sha256": "0" * 64, "bytes": 1}}),
        lambda m: m["next"]["files"].pop(WEIGHTS),
    ],
    ids=["empty", "null", "number", "list", "no files", "format", "degree", "name", "weights"],
)
def test_a_damaged_announcement(refit, change: Callable[[dict[str, Any]], Any]):
    edit(refit[0], change)
    assert MANIFEST in refused(refit[0].path)

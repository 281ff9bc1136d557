from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file

from tocom_export.bundle.manifest import MANIFEST, WEIGHTS
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.bake import bake
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.compression.method import Method
from tocom_export.errors import (
    BundleError,
    CheckFailed,
    CheckpointError,
    OutputError,
)
from tocom_export.graph.quantising import quantized_layers
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant


@pytest.fixture
def make(
    tmp_path: Path, make_blueprint: Callable[..., Blueprint], make_spec: Callable[..., VitSpec]
) -> Callable[..., Blueprint]:
    """The same blueprint, with other degrees, a bank, a method, ..."""
    spec = make_spec(depth=2, width=32, mlp_width=48, classes=3)
    return lambda **changes: make_blueprint(tmp_path, spec, **changes)


@pytest.fixture
def blueprint(make: Callable[..., Blueprint]) -> Blueprint:
    return make()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "bundle"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_the_blueprints_files_are_written(blueprint: Blueprint, out: Path):
    seen: list[str] = []
    write_bundle(blueprint, out, progress=seen.append)
    names = {
        MANIFEST, WEIGHTS, "r00.onnx", "r08.onnx", "r16.onnx", "r08.safetensors", "r16.safetensors",
    }  # fmt: skip
    assert set(contents(out)) == names == set(blueprint.files()) == set(seen)
    assert len(seen) == len(names)


def test_without_a_bank_no_variant_has_weights_of_its_own(
    make: Callable[..., Blueprint], out: Path
):
    bundle = write_bundle(make(bank=None), out)
    assert not any(v.compensated or v.baked for v in bundle.variants.values())
    assert not list(out.glob("r*.safetensors"))
    assert bundle.weight_files(16) == [out / WEIGHTS]


def test_weights_are_the_checkpoints_and_load_into_timm(blueprint: Blueprint, out: Path, make_vit):
    write_bundle(blueprint, out)
    written = load_file(out / WEIGHTS)
    assert set(written) == set(blueprint.weights.spec.weights())
    for name, tensor in written.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, blueprint.weights.checkpoint.tensors[name])
    make_vit(blueprint.weights.spec, seed=9).load_state_dict(load_torch_file(out / WEIGHTS))
    info = Checkpoint.open(out / WEIGHTS).info
    assert (info.spec, info.method) == (blueprint.weights.spec, blueprint.method)


@pytest.mark.parametrize("name", ["r08", "r16", "fast"])
def test_a_variants_weights_are_baked(make: Callable[..., Blueprint], out: Path, name: str):
    blueprint = make(schedules={"fast": [20, 3]})
    write_bundle(blueprint, out)
    written = load_file(out / f"{name}.safetensors")
    weights, variant = blueprint.weights, blueprint.variants[name]
    assert weights.bank is not None
    expected = bake(weights.checkpoint.tensors, weights.spec, weights.bank, variant)
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_graphs_point_at_their_own_weights(blueprint: Blueprint, out: Path):
    write_bundle(blueprint, out)
    for target, own in ((0, WEIGHTS), (8, "r08.safetensors")):
        model = onnx.load(out / f"r{target:02d}.onnx", load_external_data=False)
        places = {
            t.name: {e.key: e.value for e in t.external_data}["location"]
            for t in model.graph.initializer
            if t.external_data
        }
        for name, place in places.items():
            assert place == (own if name.endswith("attn.qkv.weight") else WEIGHTS)


def test_graphs_say_what_they_are(blueprint: Blueprint, out: Path):
    write_bundle(blueprint, out)
    model = onnx.load(out / "r16.onnx", load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["model"] == blueprint.weights.spec.model
    assert metadata["method"] == "tome"
    assert metadata["variant"] == "r16"
    assert json.loads(metadata["degrees"]) == [16, 16]
    assert json.loads(metadata["targets"]) == [16, 16]
    assert json.loads(metadata["source"]) == 0
    assert json.loads(metadata["scale"]) == 0.1
    assert json.loads(metadata["tokens"]) == [34, 18]
    assert json.loads(metadata["compensated"]) is True
    dense = onnx.load(out / "r00.onnx", load_external_data=False)
    assert {e.key: e.value for e in dense.metadata_props}["compensated"] == "false"


@pytest.mark.parametrize("target", [0, 8, 16, [20, 3]])
def test_the_bundle_says_what_pytorch_says(
    make: Callable[..., Blueprint], out: Path, make_vit, make_images, run_graph, target: Any
):
    from tocom_export.training.model import CompressedVit

    blueprint = make(schedules={"fast": [20, 3]})
    bundle = write_bundle(blueprint, out)
    name = "fast" if isinstance(target, list) else target
    vit = make_vit(blueprint.weights.spec, seed=9)
    for file in bundle.weight_files(name):
        vit.load_state_dict(load_torch_file(file), strict=False)
    images = make_images(blueprint.weights.spec, 3)
    with torch.inference_mode():
        expected = CompressedVit(vit, blueprint.method)(torch.from_numpy(images), target).numpy()
    found = run_graph(bundle.graph(name), images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_two_builds_are_equal_to_the_byte(blueprint: Blueprint, tmp_path: Path):
    write_bundle(blueprint, tmp_path / "a")
    write_bundle(blueprint, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("method", [Method("tome", False), Method("evit")])
def test_other_methods(make: Callable[..., Blueprint], out: Path, make_bank, method: Method):
    bank = make_bank(make().weights.spec, method=method.name)
    write_bundle(make(bank=bank, method=method), out)
    assert Bundle.open(out, hashes=True).method == method


def test_an_existing_folder_is_kept(
    blueprint: Blueprint, make: Callable[..., Blueprint], out: Path
):
    write_bundle(blueprint, out)
    before = contents(out)
    with pytest.raises(OutputError) as caught:
        write_bundle(make(targets=(4,)), out)
    assert str(out) in str(caught.value)
    assert "`force`" in str(caught.value)
    assert contents(out) == before


def test_force_replaces_a_bundle(blueprint: Blueprint, make: Callable[..., Blueprint], out: Path):
    write_bundle(blueprint, out)
    write_bundle(make(targets=(4,)), out, force=True)
    assert list(Bundle.open(out, hashes=True).variants) == ["r04"]
    assert "r16.onnx" not in contents(out)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_force_replaces_an_empty_folder(blueprint: Blueprint, out: Path):
    out.mkdir(parents=True)
    write_bundle(blueprint, out, force=True)
    Bundle.open(out, hashes=True)


def test_force_spares_a_folder_that_is_no_bundle(blueprint: Blueprint, out: Path):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("chapter 1")
    with pytest.raises(OutputError, match="other files than a bundle"):
        write_bundle(blueprint, out, force=True)
    assert contents(out.parent) == {"bundle/thesis.tex": b"chapter 1"}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_spared(blueprint: Blueprint, out: Path, force: bool):
    out.parent.mkdir()
    out.write_text("chapter 1")
    with pytest.raises(OutputError) as caught:
        write_bundle(blueprint, out, force=force)
    assert str(out) in str(caught.value)
    assert contents(out.parent) == {"bundle": b"chapter 1"}


def test_force_through_a_link_leaves_nothing_beside(
    blueprint: Blueprint, make: Callable[..., Blueprint], out: Path, tmp_path: Path
):
    real = tmp_path / "real"
    write_bundle(blueprint, real)
    out.parent.mkdir()
    out.symlink_to(real)
    write_bundle(make(targets=(4,)), out, force=True)
    assert list(Bundle.open(out).variants) == ["r04"]
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_no_place_to_write(blueprint: Blueprint, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        write_bundle(blueprint, tmp_path / "file" / "bundle")
    assert str(tmp_path / "file") in str(caught.value)


class Killed(BaseException):
    """Stands in for an interrupt."""


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("last", [WEIGHTS, "r08.safetensors", "r16.onnx", MANIFEST])
def test_a_killed_build_leaves_the_old_bundle_or_none(
    blueprint: Blueprint, make: Callable[..., Blueprint], out: Path, old: bool, last: str
):
    def progress(name: str) -> None:
        if name == last:
            raise Killed

    out.parent.mkdir()
    if old:
        write_bundle(blueprint, out)
    before = contents(out.parent)
    with pytest.raises(Killed):
        write_bundle(make(source=4), out, force=True, progress=progress)
    assert contents(out.parent) == before
    assert [p.name for p in out.parent.iterdir()] == [out.name] * old


@pytest.mark.parametrize("error", [CheckFailed("no"), BundleError("no"), Killed()])
def test_a_failing_check_leaves_nothing(blueprint: Blueprint, out: Path, error: BaseException):
    seen: list[Bundle] = []

    def check(bundle: Bundle) -> None:
        seen.append(Bundle.open(bundle.path, hashes=True))
        raise error

    with pytest.raises(type(error)):
        write_bundle(blueprint, out, check=check)
    assert seen[0].variants.keys() == {"r00", "r08", "r16"}
    assert not list(out.parent.iterdir())


def test_a_passing_check_sees_the_bundle_before_it_is_in_place(blueprint: Blueprint, out: Path):
    seen: list[bool] = []
    bundle = write_bundle(
        blueprint, out, check=lambda b: seen.append(out.exists() or b.path == out)
    )
    assert seen == [False]
    assert bundle.path == out
    assert Bundle.open(out, hashes=True) == bundle


def test_force_spares_a_folder_with_another_kind_of_manifest(blueprint: Blueprint, out: Path):
    out.mkdir(parents=True)
    (out / "manifest.json").write_text('{"manifest_version": 3}')
    (out / "app.js").write_text("all of it")
    before = contents(out)
    with pytest.raises(OutputError, match="other files than a bundle"):
        write_bundle(blueprint, out, force=True)
    assert contents(out) == before


def test_force_spares_a_note_inside_a_bundle(blueprint: Blueprint, out: Path):
    write_bundle(blueprint, out)
    (out / "notes.txt").write_text("ours")
    with pytest.raises(OutputError, match="other files than a bundle"):
        write_bundle(blueprint, out, force=True)
    assert (out / "notes.txt").read_text() == "ours"


def test_force_spares_a_bundle_whose_manifest_is_damaged(blueprint: Blueprint, out: Path):
    write_bundle(blueprint, out)
    (out / MANIFEST).write_text("{")
    with pytest.raises(OutputError, match="its manifest is damaged"):
        write_bundle(blueprint, out, force=True)
    assert (out / "r16.onnx").exists()


def test_what_is_added_is_in_the_manifest_and_replaceable(blueprint: Blueprint, out: Path):
    def extend(bundle: Bundle) -> Bundle:
        for name in ("r08.plan", "r08.plan.json"):
            (bundle.path / name).write_text("plan")
        return dataclasses.replace(bundle, plans=("r08",))

    bundle = write_bundle(blueprint, out, extend=extend)
    assert bundle.plan(8) == out / "r08.plan"
    assert Bundle.open(out, hashes=True) == bundle
    assert write_bundle(blueprint, out, force=True).plans == ()
    assert set(contents(out)) == set(blueprint.files())


def test_variants_of_one_source_share_its_record(make: Callable[..., Blueprint], out: Path):
    write_bundle(make(source=8), out)
    assert Checkpoint.open(out / WEIGHTS).info.source == 8
    blueprint, other = make(source=8), make(source=4, targets=(12,))
    mixed = dataclasses.replace(blueprint, variants={**blueprint.variants, **other.variants})
    bundle = write_bundle(mixed, out, force=True)
    assert [variant.source for variant in bundle.variants.values()] == [8, 8, 8, 4]
    assert Checkpoint.open(out / WEIGHTS).info.source is None


def test_a_source_of_0_is_recorded_where_the_checkpoint_says_it(
    make: Callable[..., Blueprint], out: Path
):
    blueprint = make()
    write_bundle(blueprint, out)
    assert Checkpoint.open(out / WEIGHTS).info.source is None  # it may as well be another
    checkpoint = dataclasses.replace(blueprint.weights.checkpoint, info=ModelInfo(source=0))
    weights = dataclasses.replace(blueprint.weights, checkpoint=checkpoint)
    write_bundle(dataclasses.replace(blueprint, weights=weights), out, force=True)
    assert Checkpoint.open(out / WEIGHTS).info.source == 0


def test_a_bundle_keeps_what_its_blueprint_says(make: Callable[..., Blueprint], out: Path):
    blueprint = make(
        classes=("cat", "dog", "owl"),
        preprocess=Preprocess(crop_pct=0.9, crop_mode="squash"),
        scale=0.05,
        schedules={"fast": [20, 3]},
    )
    bundle = write_bundle(blueprint, out)
    assert bundle.variants == blueprint.variants
    assert bundle.variant("fast").scale == 0.05
    info = Checkpoint.open(out / WEIGHTS).info
    assert info.classes == bundle.classes == ("cat", "dog", "owl")
    assert info.preprocess == bundle.preprocess == blueprint.preprocess
    assert Bundle.open(out).preprocess.crop_mode == "squash"


def test_weights_beyond_fp16_leave_nothing(make: Callable[..., Blueprint], out: Path):
    blueprint = make(precision="fp16")
    checkpoint = blueprint.weights.checkpoint
    tensors = {name: t * np.float32(1e5) for name, t in checkpoint.tensors.items()}
    large = dataclasses.replace(checkpoint, tensors=tensors)
    weights = dataclasses.replace(blueprint.weights, checkpoint=large)
    blueprint = dataclasses.replace(blueprint, weights=weights)
    with pytest.raises(CheckpointError, match="fp16"):
        write_bundle(blueprint, out)
    assert not list(out.parent.iterdir())


def test_ranges_are_measured_on_each_variant_in_fp32(make: Callable[..., Blueprint], out: Path):
    seen: list[str] = []

    def calibrate(bundle: Bundle, variant: Variant) -> dict[str, float]:
        assert Bundle.open(bundle.path, hashes=True).precision == "fp32"
        seen.append(variant.name)
        return dict.fromkeys(quantized_layers(bundle.spec), 0.1)

    bundle = write_bundle(make(precision="int8"), out, calibrate=calibrate)
    assert seen == ["r00", "r08", "r16"]
    assert Bundle.open(out, hashes=True) == bundle
    assert bundle.precision == "int8"
    assert {path.name for path in out.iterdir()} == {MANIFEST, *bundle.files}

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file

from tocom_export.bundle.opening import MANIFEST, WEIGHTS, Bundle
from tocom_export.bundle.writing import BuildPlan, write_bundle
from tocom_export.compression.bake import bake
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.errors import BundleError, CheckFailed, OutputError


@pytest.fixture
def plan(tmp_path: Path, make_plan: Callable[..., BuildPlan], make_spec) -> BuildPlan:
    return make_plan(tmp_path, make_spec(depth=2, width=32, mlp_width=48, classes=3))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "bundle"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_the_planned_files_are_written(plan: BuildPlan, out: Path):
    seen: list[str] = []
    write_bundle(plan, out, progress=seen.append)
    names = {
        MANIFEST, WEIGHTS, "r00.onnx", "r08.onnx", "r16.onnx", "r08.safetensors", "r16.safetensors",
    }  # fmt: skip
    assert set(contents(out)) == names == set(plan.files()) == set(seen)
    assert len(seen) == len(names)


def test_without_a_bank_no_target_has_weights_of_its_own(plan: BuildPlan, out: Path):
    bundle = write_bundle(dataclasses.replace(plan, bank=None), out)
    assert not bundle.compensated
    assert not list(out.glob("r*.safetensors"))
    assert bundle.weight_files(16) == [out / WEIGHTS]


def test_weights_are_the_checkpoints_and_load_into_timm(plan: BuildPlan, out: Path, make_vit):
    write_bundle(plan, out)
    written = load_file(out / WEIGHTS)
    assert set(written) == set(plan.spec.weights())
    for name, tensor in written.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, plan.checkpoint.tensors[name])
    make_vit(plan.spec, seed=9).load_state_dict(load_torch_file(out / WEIGHTS))
    info = Checkpoint.open(out / WEIGHTS).info
    assert (info.spec, info.source, info.method) == (plan.spec, 0, plan.method)


@pytest.mark.parametrize("target", [8, 16])
def test_a_targets_weights_are_baked(plan: BuildPlan, out: Path, target: int):
    write_bundle(plan, out)
    written = load_file(out / f"r{target:02d}.safetensors")
    tensors = plan.checkpoint.tensors
    expected = bake(tensors, plan.spec, plan.bank, 0, target, plan.scale)
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_graphs_point_at_their_own_weights(plan: BuildPlan, out: Path):
    write_bundle(plan, out)
    for target, own in ((0, WEIGHTS), (8, "r08.safetensors")):
        model = onnx.load(out / f"r{target:02d}.onnx", load_external_data=False)
        places = {
            t.name: {e.key: e.value for e in t.external_data}["location"]
            for t in model.graph.initializer
            if t.external_data
        }
        for name, place in places.items():
            assert place == (own if name.endswith("attn.qkv.weight") else WEIGHTS)


def test_graphs_say_what_they_are(plan: BuildPlan, out: Path):
    write_bundle(plan, out)
    model = onnx.load(out / "r16.onnx", load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["model"] == plan.spec.model
    assert metadata["method"] == "tome"
    assert json.loads(metadata["target"]) == 16
    assert json.loads(metadata["source"]) == 0
    assert json.loads(metadata["schedule"]) == [34, 18]
    assert json.loads(metadata["compensated"]) is True


@pytest.mark.parametrize("target", [0, 8, 16])
def test_the_bundle_says_what_pytorch_says(
    plan: BuildPlan, out: Path, make_vit, make_images, run_graph, target: int
):
    from tocom_export.training.model import CompressedVit

    bundle = write_bundle(plan, out)
    vit = make_vit(plan.spec, seed=9)
    for file in bundle.weight_files(target):
        vit.load_state_dict(load_torch_file(file), strict=False)
    images = make_images(plan.spec, 3)
    with torch.inference_mode():
        expected = CompressedVit(vit, plan.method)(torch.from_numpy(images), target).numpy()
    found = run_graph(bundle.graph(target), images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_two_builds_are_equal_to_the_byte(plan: BuildPlan, tmp_path: Path):
    write_bundle(plan, tmp_path / "a")
    write_bundle(plan, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("method", [Method("tome", False), Method("evit")])
def test_other_methods(plan: BuildPlan, out: Path, make_bank, method: Method):
    bank = make_bank(plan.spec, method=method.name)
    write_bundle(dataclasses.replace(plan, bank=bank, method=method), out)
    assert Bundle.open(out, hashes=True).method == method


def test_an_existing_folder_is_kept(plan: BuildPlan, out: Path):
    write_bundle(plan, out)
    before = contents(out)
    with pytest.raises(OutputError) as caught:
        write_bundle(dataclasses.replace(plan, targets=(4,)), out)
    assert str(out) in str(caught.value)
    assert "--force" in str(caught.value)
    assert contents(out) == before


def test_force_replaces_a_bundle(plan: BuildPlan, out: Path):
    write_bundle(plan, out)
    write_bundle(dataclasses.replace(plan, targets=(4,)), out, force=True)
    assert list(Bundle.open(out, hashes=True).targets) == [4]
    assert "r16.onnx" not in contents(out)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_force_replaces_an_empty_folder(plan: BuildPlan, out: Path):
    out.mkdir(parents=True)
    write_bundle(plan, out, force=True)
    Bundle.open(out, hashes=True)


def test_force_spares_a_folder_that_is_no_bundle(plan: BuildPlan, out: Path):
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("chapter 1")
    with pytest.raises(OutputError, match="other files than a bundle"):
        write_bundle(plan, out, force=True)
    assert contents(out.parent) == {"bundle/thesis.tex": b"chapter 1"}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_spared(plan: BuildPlan, out: Path, force: bool):
    out.parent.mkdir()
    out.write_text("chapter 1")
    with pytest.raises(OutputError) as caught:
        write_bundle(plan, out, force=force)
    assert str(out) in str(caught.value)
    assert contents(out.parent) == {"bundle": b"chapter 1"}


def test_force_through_a_link_leaves_nothing_beside(plan: BuildPlan, out: Path, tmp_path: Path):
    real = tmp_path / "real"
    write_bundle(plan, real)
    out.parent.mkdir()
    out.symlink_to(real)
    write_bundle(dataclasses.replace(plan, targets=(4,)), out, force=True)
    assert list(Bundle.open(out).targets) == [4]
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_no_place_to_write(plan: BuildPlan, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        write_bundle(plan, tmp_path / "file" / "bundle")
    assert str(tmp_path / "file") in str(caught.value)


class Killed(BaseException):
    """Stands in for an interrupt."""


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("last", [WEIGHTS, "r08.safetensors", "r16.onnx", MANIFEST])
def test_a_killed_build_leaves_the_old_bundle_or_none(
    plan: BuildPlan, out: Path, old: bool, last: str
):
    def progress(name: str) -> None:
        if name == last:
            raise Killed

    out.parent.mkdir()
    if old:
        write_bundle(plan, out)
    before = contents(out.parent)
    with pytest.raises(Killed):
        write_bundle(dataclasses.replace(plan, source=4), out, force=True, progress=progress)
    assert contents(out.parent) == before
    assert [p.name for p in out.parent.iterdir()] == [out.name] * old


@pytest.mark.parametrize("error", [CheckFailed("no"), BundleError("no"), Killed()])
def test_a_failing_check_leaves_nothing(plan: BuildPlan, out: Path, error: BaseException):
    seen: list[Bundle] = []

    def check(bundle: Bundle) -> None:
        seen.append(Bundle.open(bundle.path, hashes=True))
        raise error

    with pytest.raises(type(error)):
        write_bundle(plan, out, check=check)
    assert seen[0].targets.keys() == {0, 8, 16}
    assert not list(out.parent.iterdir())


def test_a_passing_check_sees_the_bundle_before_it_is_in_place(plan: BuildPlan, out: Path):
    seen: list[bool] = []
    bundle = write_bundle(plan, out, check=lambda b: seen.append(out.exists() or b.path == out))
    assert seen == [False]
    assert bundle.path == out
    assert Bundle.open(out, hashes=True) == bundle


def test_force_spares_a_folder_with_another_kind_of_manifest(plan: BuildPlan, out: Path):
    out.mkdir(parents=True)
    (out / "manifest.json").write_text('{"manifest_version": 3}')
    (out / "app.js").write_text("all of it")
    before = contents(out)
    with pytest.raises(OutputError, match="other files than a bundle"):
        write_bundle(plan, out, force=True)
    assert contents(out) == before


def test_force_spares_a_note_inside_a_bundle(plan: BuildPlan, out: Path):
    write_bundle(plan, out)
    (out / "notes.txt").write_text("ours")
    with pytest.raises(OutputError, match="other files than a bundle"):
        write_bundle(plan, out, force=True)
    assert (out / "notes.txt").read_text() == "ours"

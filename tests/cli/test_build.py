from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

import tocom_export.bundle.weights
from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bake import bake
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.io.json_codec import decode
from tocom_export.model.catalogue import known_model
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant

Run = Callable[..., Result]
Options = tuple[object, ...]


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def manifest(bundle: str | Path) -> dict:
    return json.loads((Path(bundle) / "manifest.json").read_text())


def test_the_default_targets_in_the_default_folder(succeeds: Run, model: Options, here: Path):
    result = succeeds("build", *model)
    assert names(here) == {"tiny-source4"}
    graphs = {f"r{degree:02d}.onnx" for degree in (0, 4, 8, 12, 16)}
    own = {f"r{degree:02d}.safetensors" for degree in (0, 8, 12, 16)}  # 4 is the source
    assert names(here / "tiny-source4") == {"manifest.json", "weights.safetensors", *graphs, *own}
    assert "Wrote tiny-source4" in result.stderr
    assert all(graph.removesuffix(".onnx") in result.stdout for graph in graphs)
    assert "tiny, source 4, ToCom scale 0.1" in result.stdout
    heads = result.stdout.splitlines()[1].split()
    assert " ".join(heads) == "variant tokens MACs saved own files"


def test_the_manifest(succeeds: Run, model: Options, spec: VitSpec):
    succeeds("build", *model, "--targets", "4,8", "--scale", "0.2", "--out", "out")
    data = manifest("out")
    assert decode(VitSpec, data["spec"]) == spec
    assert (data["format"], data["method"]) == (2, {"name": "tome", "proportional": True})
    assert data["variants"] == {
        f"r{degree:02d}": {
            "name": f"r{degree:02d}", "degrees": [degree] * 4, "targets": [degree] * 4,
            "source": 4, "scale": 0.2, "compensated": True,
        }
        for degree in (4, 8)
    }  # fmt: skip
    assert data["classes"][0] == "class-a"
    assert set(data["files"]) == names(Path("out")) - {"manifest.json"}
    for name, record in data["files"].items():
        content = Path("out", name).read_bytes()
        assert record == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_json_is_one_document(succeeds: Run, model: Options):
    result = succeeds("build", *model, "--targets", "4,8", "--json")
    document = json.loads(result.stdout)
    assert document["bundle"] == "tiny-source4"
    assert (document["model"], document["method"]) == ("tiny", "tome")
    sizes = [record["bytes"] for record in manifest("tiny-source4")["files"].values()]
    assert document["bytes"] == sum(sizes)
    four, eight = document["variants"]
    assert (four["variant"], eight["variant"]) == ("r04", "r08")
    assert (four["degrees"], eight["degrees"]) == ([4] * 4, [8] * 4)
    assert (four["compensated"], eight["compensated"]) == (False, True)  # 4 is the source
    assert (eight["source"], eight["scale"]) == (4, 0.1)
    assert (four["tokens"], eight["tokens"]) == ([13, 9, 5, 3], [9, 5, 3, 2])
    assert Path(eight["graph"]).is_file()
    assert eight["macs"] < four["macs"]
    assert four["check"] is eight["check"] is None


def test_verified_by_default(succeeds: Run, checkpoint: Path, bank_file: Path):
    options = ("--checkpoint", checkpoint, "--bank", bank_file, "--targets", "4,8")
    document = json.loads(succeeds("build", *options, "--json").stdout)
    for variant in document["variants"]:
        check = variant["check"]
        assert (check["variant"], check["passed"]) == (variant["variant"], True)
        assert check["agreement"] == 100
        assert 0 < check["max_difference"] < check["tolerance"]
    table = succeeds("build", *options, "--verify", "--force").stdout
    assert table.count("100 %") == 2


def test_an_engine_that_fails_the_check_is_not_kept(
    fails: Run, checkpoint: Path, bank_file: Path, here: Path, monkeypatch: pytest.MonkeyPatch
):
    def bake_too_much(tensors: Any, spec: VitSpec, bank: ToComBank, variant: Variant) -> Any:
        return bake(tensors, spec, bank, dataclasses.replace(variant, scale=3 * variant.scale))

    monkeypatch.setattr(tocom_export.bundle.weights, "bake", bake_too_much)
    options = ("--checkpoint", checkpoint, "--bank", bank_file, "--targets", "8")
    fails("build", *options, says=("r08.onnx differs", "no bundle was written"), status=1)
    assert names(here) == set()


@pytest.mark.parametrize(
    "targets, expected",
    [("8", [8]), ("16,4,4", [4, 16]), ("0-3", [0, 1, 2, 3]), ("0,4-16:6", [0, 4, 10, 16])],
)
def test_forms_of_targets(succeeds: Run, model: Options, targets: str, expected: list[int]):
    succeeds("build", *model, "--targets", targets, "--out", "out")
    variants = Bundle.open(Path("out"), hashes=True).variants.values()
    assert [variant.degree for variant in variants] == expected


def test_the_same_build_gives_the_same_bytes(succeeds: Run, model: Options):
    for out in ("one", "two"):
        succeeds("build", *model, "--targets", "4,8", "--out", out)
    assert manifest("one") == manifest("two")


@pytest.mark.parametrize("as_json", [True, False])
def test_dry_run_names_the_files_and_writes_none(
    succeeds: Run, model: Options, here: Path, as_json: bool
):
    flags = ["--json"] if as_json else []
    result = succeeds("build", *model, "--out", "out", "--dry-run", *flags)
    assert names(here) == set()
    succeeds("build", *model, "--out", "out")
    if as_json:
        document = json.loads(result.stdout)
        assert document["bundle"] == "out"
        assert set(document["files"]) == names(here / "out")
    else:
        lines = {line.strip() for line in result.stdout.splitlines()}
        assert {f"out/{name}" for name in names(here / "out")} <= lines


def test_the_folders_above_are_made(succeeds: Run, model: Options):
    succeeds("build", *model, "--targets", "8", "--out", "new/er/out")
    assert Bundle.open(Path("new/er/out"), hashes=True).variant(8).source == 4


def test_force_replaces_the_whole_bundle(succeeds: Run, model: Options, here: Path):
    succeeds("build", *model, "--targets", "4,8", "--out", "out")
    succeeds("build", *model, "--targets", "12", "--out", "out", "--force")
    expected = {"manifest.json", "weights.safetensors", "r12.onnx", "r12.safetensors"}
    assert names(here / "out") == expected
    assert names(here) == {"out"}
    assert Bundle.open(here / "out", hashes=True)


def test_no_bank(succeeds: Run, checkpoint: Path, make_images: Callable, spec: VitSpec):
    options = ("--checkpoint", checkpoint, "--bank", "none", "--no-verify", "--targets", "4,8")
    document = json.loads(succeeds("build", *options, "--out", "out", "--json").stdout)
    assert [variant["compensated"] for variant in document["variants"]] == [False, False]
    assert names(Path("out")) == {"manifest.json", "weights.safetensors", "r04.onnx", "r08.onnx"}
    found = manifest("out")["variants"].values()
    assert [variant["compensated"] for variant in found] == [False, False]
    assert "not compensated" in succeeds("build", *options, "--out", "out", "--force").stdout
    assert OnnxEngine(Bundle.open(Path("out")), 8).run(make_images(spec)).shape == (2, 10)


def test_the_scale_changes_the_compensated_weights_alone(succeeds: Run, model: Options):
    for scale in ("0.1", "0.15"):
        succeeds("build", *model, "--targets", "4,8", "--scale", scale, "--out", scale)
    one, other = (manifest(scale)["files"] for scale in ("0.1", "0.15"))
    assert one["weights.safetensors"] == other["weights.safetensors"]
    assert one["r08.safetensors"]["sha256"] != other["r08.safetensors"]["sha256"]


@pytest.mark.parametrize("with_bank", [True, False])
def test_pruning(
    succeeds: Run, checkpoint: Path, make_bank: Callable, spec: VitSpec, with_bank: bool
):
    """By the bank's method, or as asked for where there is none."""
    make_bank(spec, method="evit").save(Path("evit.safetensors"))
    chosen = ("--bank", "evit.safetensors") if with_bank else ("--bank", "none", "--method", "evit")
    options = ("--checkpoint", checkpoint, *chosen, "--no-verify", "--targets", "8")
    succeeds("build", *options, "--out", "evit")
    assert manifest("evit")["method"]["name"] == "evit"
    engine = json.loads(succeeds("inspect", "evit/r08.onnx", "--json").stdout)
    assert engine["metadata"]["method"] == "evit"


def test_the_source_is_the_checkpoints(succeeds: Run, model: Options):
    succeeds("build", *model, "--targets", "8", "--out", "left-out")
    succeeds("build", *model, "--targets", "8", "--source", "4", "--out", "given")
    assert manifest("left-out") == manifest("given")


@pytest.mark.parametrize("options, source", [((), 0), (("--source", "12"), 12)])
def test_the_source_of_a_checkpoint_that_does_not_say(
    succeeds: Run, make_checkpoint: Callable, bank_file: Path, spec: VitSpec, here: Path,
    options: Options, source: int,
):  # fmt: skip
    file = make_checkpoint(here, spec, metadata=to_metadata(ModelInfo(spec)))
    model = ("--checkpoint", file, "--bank", bank_file, "--no-verify")
    succeeds("build", *model, "--targets", "0,12", *options)
    data = manifest(f"tiny-source{source}")
    assert {variant["source"] for variant in data["variants"].values()} == {source}
    own = {name for name in data["files"] if name.startswith("r") and "safe" in name}
    assert own == {f"r{12 - source:02d}.safetensors"}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_bare_weights_of_a_timm_model(
    succeeds: Run, make_checkpoint: Callable, make_weights: Callable, here: Path, suffix: str
):
    spec, preprocess = known_model("deit_tiny_patch16_224")
    if suffix == ".pth":
        import torch

        weights = {name: torch.from_numpy(w) for name, w in make_weights(spec).items()}
        torch.save({"model": weights}, here / "deit.pth")
        file = here / "deit.pth"
    else:
        file = make_checkpoint(here, spec)
    options = ("--model", "deit_tiny_patch16_224", "--checkpoint", file, "--bank", "none")
    succeeds("build", *options, "--targets", "16", "--no-verify")
    bundle = Bundle.open(here / "deit_tiny_patch16_224-source0", hashes=True)
    (variant,) = bundle.variants.values()
    tokens = variant.schedule(bundle.spec).tokens_out
    assert tokens == (181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11)
    assert bundle.preprocess == preprocess
    written = Checkpoint.open(bundle.path / "weights.safetensors")
    for name, weight in make_weights(spec).items():
        np.testing.assert_array_equal(written.tensors[name], weight)


def test_quiet(succeeds: Run, model: Options):
    assert succeeds("build", *model, "--targets", "8", "-q", "--json").stderr == ""


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_a_precision(
    succeeds: Run, fails: Run, checkpoint: Path, bank_file: Path,
    image_folder: Callable[..., Path], precision: str,
):  # fmt: skip
    options = ["--checkpoint", checkpoint, "--bank", bank_file, "--targets", "4,8"]
    options += ["--precision", precision, "--out", "out", "--json"]
    if precision == "int8":
        options += ["--calibrate", image_folder(Path("photos"))]
    document = json.loads(succeeds("build", *options).stdout)
    assert document["precision"] == manifest("out")["precision"] == precision
    for variant in document["variants"]:
        assert variant["check"]["passed"] is True
        assert variant["check"]["max_difference"] > 1e-5  # not float32 under another name
    succeeds("verify", "out")
    succeeds("inspect", "out")
    succeeds("inspect", "out/weights.safetensors")
    if precision == "int8":
        says = ("out/weights.safetensors", "is int8", "the checkpoint")
        fails("build", "--checkpoint", "out/weights.safetensors", "--bank", "none", says=says)


def test_int8_and_its_images_belong_together(
    fails: Run, model: Options, image_folder: Callable[..., Path]
):
    fails(
        "build", *model, "--precision", "int8", says=("--precision int8", "--calibrate: a folder")
    )
    photos = image_folder(Path("photos"))
    fails(
        "build",
        *model,
        "--calibrate",
        photos,
        says=("--calibrate", "--precision int8", "this is fp32"),
    )
    fails("build", *model, "--precision", "int8", "--calibrate", "nowhere", says=("nowhere",))
    assert not Path("tiny-source4").exists()


@pytest.mark.parametrize("each, few", [(15, True), (16, False)])
def test_few_images_for_int8(
    succeeds: Run, model: Options, image_folder: Callable[..., Path], each: int, few: bool
):
    options = ("--precision", "int8", "--calibrate", image_folder(Path("photos"), each=each))
    said = succeeds("build", *model, "--targets", 8, *options).stderr
    assert ("photos has 30 images to calibrate on" in said) == few

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tocom_export.bundle.manifest import seal
from tocom_export.compression.metadata import ModelInfo, to_metadata

Run = Callable[..., Result]


def test_a_bundle(succeeds: Run, bundle: Path):
    text = succeeds("inspect", bundle).stdout
    for fact in ("tiny", "3×32×32", "17 of width 64, 4 heads", "hashes"):
        assert fact in text
    rows = [line.split() for line in text.splitlines()]
    assert ["variant", "degree", "source", "scale", "tokens", "MACs", "own", "weights"] in rows
    assert ["r04", "4", "4", "-", "17", "→", "3"] in [row[:7] for row in rows]  # its source
    assert ["r08", "8", "4", "0.1", "17", "→", "2"] in [row[:7] for row in rows]
    assert "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 1 (center), bicubic" in text
    assert "accuracy" not in text
    assert "9 5 3 2" in succeeds("inspect", bundle, "--layers").stdout


def test_a_bundle_s_accuracy(succeeds: Run, bundle: Path):
    """Where it was measured."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(seal({**manifest, "accuracy": {"r08": 70.25}}))
    rows = [line.split() for line in succeeds("inspect", bundle).stdout.splitlines()]
    assert next(row for row in rows if row[0] == "variant")[-1] == "accuracy"
    assert next(row for row in rows if row[0] == "r04")[-1] == "-"
    assert next(row for row in rows if row[0] == "r08")[-2:] == ["70.25", "%"]


def test_a_bundle_as_json(succeeds: Run, bundle: Path):
    document = json.loads(succeeds("inspect", bundle, "--json").stdout)
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["sha256"]  # the manifest's own, which was compared
    assert document == {"kind": "bundle", "path": str(bundle), **manifest}


@pytest.mark.parametrize("moved", [False, True])
def test_an_engine(succeeds: Run, bundle: Path, tmp_path: Path, moved: bool):
    """Its weights need not be there."""
    file = bundle / "r08.onnx"
    if moved:
        file = file.rename(tmp_path / "alone.onnx")
    document = json.loads(succeeds("inspect", file, "--json").stdout)
    assert (document["kind"], document["path"]) == ("engine", str(file))
    assert document["inputs"] == {"images": "[batch,3,32,32]"}
    assert document["outputs"] == {"logits": "[batch,10]"}
    assert document["weight files"] == ["r08.safetensors", "weights.safetensors"]
    metadata = document["metadata"]
    assert (metadata["model"], metadata["method"]) == ("tiny", "tome")
    assert metadata["variant"] == "r08"
    facts = {name: json.loads(metadata[name]) for name in ("source", "degrees", "tokens", "scale")}
    assert facts == {"source": 4, "degrees": [8] * 4, "tokens": [9, 5, 3, 2], "scale": 0.1}
    assert json.loads(metadata["compensated"]) is True
    assert "operators" not in document


def test_an_engines_layers(succeeds: Run, bundle: Path):
    document = json.loads(succeeds("inspect", bundle / "r08.onnx", "--layers", "--json").stdout)
    assert document["operators"]["Softmax"] == 4
    assert sum(document["operators"].values()) == sum(document["scopes"].values())
    assert sum(document["operators"].values()) == document["nodes"]
    text = succeeds("inspect", bundle / "r08.onnx", "--layers").stdout
    assert "Softmax" in text
    assert "[batch,3,32,32]" in text


def test_a_bank(succeeds: Run, bank_file: Path):
    document = json.loads(succeeds("inspect", bank_file, "--json").stdout)
    assert document.pop("size").endswith("MB")
    assert document == {
        "kind": "bank", "path": str(bank_file), "model": "tiny", "method": "tome", "layers": 4,
        "width": 64, "arithmetic": "steps", "groups": 16, "rank": 2,
        "parameters": 4 * 2 * 16 * 2 * 64 * 2,
    }  # fmt: skip
    layers = json.loads(succeeds("inspect", bank_file, "--layers", "--json").stdout)
    assert [len(pair) for pair in layers["gap_norms"]] == [2, 2, 2, 2]
    assert all(norm > 0 for pair in layers["gap_norms"] for norm in pair)
    assert "layer 3" in succeeds("inspect", bank_file, "--layers").stdout


def test_a_checkpoint(succeeds: Run, checkpoint: Path, spec):
    document = json.loads(succeeds("inspect", checkpoint, "--json").stdout)
    assert (document["kind"], document["model"]) == ("checkpoint", "tiny")
    assert (document["source degree"], document["method"]) == (4, "tome")
    assert (document["classes"], document["tensors"]) == (10, len(spec.weights()))
    assert document["dtypes"] == "float32"
    assert (document["images"], document["adapters"]) == ("3×32×32", None)
    assert document["image statistics"] is None
    text = succeeds("inspect", checkpoint, "--layers").stdout
    assert "blocks.3.attn.qkv.weight" in text
    assert "[192, 64]" in text
    assert "3×32×32" in text
    assert "adapters" not in text


def test_a_checkpoint_with_adapters(
    succeeds: Run, make_spec: Callable, make_checkpoint: Callable, tmp_path: Path
):
    spec = make_spec(image_size=[32, 48], adapter_width=3)
    file = make_checkpoint(tmp_path, spec, metadata=to_metadata(ModelInfo(spec)))
    document = json.loads(succeeds("inspect", file, "--json").stdout)
    assert (document["images"], document["adapters"]) == ("3×32×48", 3)
    assert "adapters" in succeeds("inspect", file).stdout


def test_a_checkpoint_that_does_not_say_what_it_is(
    succeeds: Run, make_spec: Callable, make_checkpoint: Callable, tmp_path: Path
):
    file = make_checkpoint(tmp_path, make_spec())
    document = json.loads(succeeds("inspect", file, "--json").stdout)
    assert [document[name] for name in ("model", "images", "adapters")] == [None] * 3


def test_the_weights_of_a_bundle(succeeds: Run, bundle: Path):
    for name, variant, model in (("r08", "r08", None), ("weights", None, "tiny")):
        file = bundle / f"{name}.safetensors"
        document = json.loads(succeeds("inspect", file, "--json").stdout)
        assert document["kind"] == "checkpoint"
        assert (document["variant"], document["model"]) == (variant, model)
        told = "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 1 (center), bicubic"
        assert document["image statistics"] == (told if name == "weights" else None)


@pytest.mark.parametrize("name", ["weights.safetensors", "r08.safetensors", "r08.onnx"])
def test_a_changed_byte(fails: Run, bundle: Path, damage: Callable, name: str):
    damage(bundle / name)
    fails("inspect", bundle, says=(bundle / name, "SHA-256 differs"))


@pytest.mark.parametrize("name", ["weights.safetensors", "r08.safetensors", "r08.onnx"])
def test_a_missing_file(fails: Run, bundle: Path, name: str):
    (bundle / name).unlink()
    fails("inspect", bundle, says=(bundle / name, "is missing"))


@pytest.fixture
def planned(nvidia, succeeds: Run, model: tuple[object, ...], tmp_path: Path) -> Path:
    """A bundle with a plan of a pretended TensorRT."""
    options = ("--targets", "4,8", "--backend", "tensorrt", "--out", tmp_path / "planned")
    succeeds("build", *model, *options)
    return tmp_path / "planned"


def test_a_bundle_with_plans(succeeds: Run, planned: Path):
    text = succeeds("inspect", planned).stdout
    assert "r04.plan, r08.plan" in text
    assert "all as in the manifest and the plans' JSON" in text


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize(
    "change, says",
    [
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-9]), "r08.plan is damaged"),
        (lambda plan: plan.unlink(), "r08.plan: can't be read"),
        (lambda plan: plan.with_name("r08.plan.json").unlink(), "has no r08.plan.json"),
    ],
)
def test_a_plan_that_is_not_what_its_json_says(
    fails: Run, planned: Path, change: Callable[[Path], object], says: str, options
):
    change(planned / "r08.plan")
    assert fails("inspect", planned, *options, says=(planned / "r08.plan", says)).stdout == ""


def test_a_plan_s_json(fails: Run, planned: Path):
    says = (planned / "r08.plan.json", f"inspect {planned / 'r08.plan'}.")
    fails("inspect", planned / "r08.plan.json", says=says)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 99}', "null"])
def test_a_broken_manifest(fails: Run, bundle: Path, content: str):
    (bundle / "manifest.json").write_text(content)
    fails("inspect", bundle, says=(bundle / "manifest.json",))


def test_a_folder_that_is_no_bundle(fails: Run, tmp_path: Path):
    fails("inspect", tmp_path, says=(tmp_path, "is not a bundle"))


@pytest.mark.parametrize("name", ["none", "none.onnx", "none.safetensors"])
def test_no_such_file(fails: Run, name: str):
    fails("inspect", name, says=(name, "no such file"))


@pytest.mark.parametrize("content", [b"", b"nothing of the kind"])
@pytest.mark.parametrize("suffix", ["onnx", "safetensors", "pth", "txt"])
def test_a_file_that_is_none(fails: Run, here: Path, suffix: str, content: bytes):
    (here / f"file.{suffix}").write_bytes(content)
    fails("inspect", f"file.{suffix}", says=(f"file.{suffix}",))

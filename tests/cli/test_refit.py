from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.engines.onnx.engine import OnnxEngine

Run = Callable[..., Result]


def shown_in(text: str, name: str) -> list[str]:
    """The first three cells, or fewer, of a row of ``inspect``."""
    (row,) = (line.split() for line in text.splitlines() if line.split()[0] == name)
    return row[1:4]


def test_another_source(
    succeeds: Run, fails: Run, bundle: Path, bank_file: Path, make_images, spec
):
    images = make_images(spec)
    before = OnnxEngine(Bundle.open(bundle), 8).run(images)
    anonymous = Path("anonymous.safetensors")  # it doesn't say what it was trained at
    save_file(load_file(bundle / "weights.safetensors"), anonymous)
    options = ("--checkpoint", anonymous, "--bank", bank_file)
    result = succeeds(
        "refit", bundle / "r08.onnx", *options, "--source", 16, "--scale", 0.05, "--json"
    )
    document = json.loads(result.stdout)
    assert (document["variant"], document["degrees"]) == ("r08", [8] * 4)
    assert (document["source"], document["scale"]) == (16, 0.05)
    assert document["compensated"] is True
    assert document["check"]["passed"] is True
    assert not np.allclose(OnnxEngine(Bundle.open(bundle), 8).run(images), before)
    assert shown_in(succeeds("inspect", bundle).stdout, "r08") == ["8", "16", "0.05"]
    succeeds("verify", bundle)
    says = ("was refitted", "Refit the whole bundle")
    fails("evaluate", bundle, "--data", "images", "--variants", 8, says=says)
    # what isn't named stays as it is, and back
    again = ("refit", bundle / "r08.onnx", "--bank", bank_file, "--no-verify")
    says = ("--source 8, but", "weights.safetensors was trained at degree 4", "leave --source out")
    fails(*again, "--source", 8, says=says)
    document = json.loads(succeeds(*again, "--scale", 0.1, "--json").stdout)
    assert (document["source"], document["scale"]) == (16, 0.1)
    succeeds(*again, "--source", 4)
    np.testing.assert_array_equal(OnnxEngine(Bundle.open(bundle), 8).run(images), before)


def test_without_a_bank(succeeds: Run, bundle: Path, bank_file: Path):
    engine = bundle / "r08.onnx"
    result = succeeds("refit", engine, "--bank", "none", "--scale", 0.2, "--json")
    document = json.loads(result.stdout)
    assert (document["bank"], document["compensated"]) == ("none", False)
    assert "; bank: none." in result.stderr
    entry = {
        "name": "r08", "degrees": [8] * 4, "targets": [8] * 4, "source": 4, "scale": 0.2,
        "compensated": False,
    }  # fmt: skip
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["variants"]["r08"], manifest["refitted"]) == (entry, ["r08"])
    text = succeeds("inspect", bundle).stdout
    assert shown_in(text, "r08") == ["8", "4", "-"]
    assert shown_in(text, "refitted") == ["r08"]
    assert json.loads(succeeds("inspect", engine, "--json").stdout)["refitted"] == entry
    rows = [line.split() for line in succeeds("inspect", engine).stdout.splitlines()]
    assert {("scale", "0.2"), ("compensated", "false"), ("refitted", "yes")} <= {*map(tuple, rows)}
    result = succeeds("refit", engine, "--bank", bank_file)
    assert f"; bank: {bank_file}." in result.stderr
    assert shown_in(succeeds("inspect", bundle).stdout, "r08") == ["8", "4", "0.2"]


def test_without_compensation_it_stays_so(succeeds: Run, fails: Run, bundle: Path, bank_file: Path):
    """Until a bank is named."""
    refit = ("refit", bundle / "r08.onnx")
    fails(*refit, "--scale", 0.2, says=("tiny has no bank of its own",))
    succeeds(*refit, "--bank", "none")
    document = json.loads(succeeds(*refit, "--scale", 0.2, "--json").stdout)
    assert (document["bank"], document["compensated"], document["scale"]) == ("none", False, 0.2)
    document = json.loads(succeeds(*refit, "--bank", bank_file, "--json").stdout)
    assert (document["compensated"], document["scale"]) == (True, 0.2)


def test_the_bank_of_the_package(succeeds: Run):
    succeeds("build", "--targets", 8, "--no-verify", "--out", "first")
    result = succeeds("refit", "first/r08.onnx", "--scale", 0.2, "--no-verify", "--json")
    assert json.loads(result.stdout)["bank"] == "of the package"


def test_an_engine_beside_a_damaged_bundle(succeeds: Run, bundle: Path, bank_file: Path):
    succeeds("refit", bundle / "r08.onnx", "--bank", bank_file, "--scale", 0.2, "--no-verify")
    (bundle / "manifest.json").write_text("{")
    document = json.loads(succeeds("inspect", bundle / "r08.onnx", "--json").stdout)
    assert document["refitted"] is None


def test_another_checkpoint(
    succeeds: Run, fails: Run, bundle: Path, bank_file: Path, checkpoint: Path, info: ModelInfo
):
    tensors = load_file(checkpoint)
    tensors["blocks.1.attn.qkv.weight"] *= 2
    save_file(tensors, "other.safetensors", to_metadata(info))
    options = ("--checkpoint", "other.safetensors", "--bank", bank_file)
    succeeds("refit", bundle / "r08.onnx", *options)
    says = ("--source 8", "trained at degree 4", "leave --source out")
    fails("refit", bundle / "r08.onnx", *options, "--source", 8, says=says)
    tensors["head.bias"] += 1
    save_file(tensors, "other.safetensors", to_metadata(info))
    before = (bundle / "r08.safetensors").read_bytes()
    says = ("other.safetensors", "another head.bias", "refit the bundle")
    fails("refit", bundle / "r08.onnx", *options, says=says)
    assert (bundle / "r08.safetensors").read_bytes() == before


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_the_shipped_model_there_and_back(succeeds: Run, photos: Path, precision: str):
    """From weights that were rounded, another scale's would be others than a build's."""
    ranges = ("--calibrate", photos) if precision == "int8" else ()
    options = ("--targets", "8", "--precision", precision, *ranges, "--no-verify")
    succeeds("build", *options, "--out", "first")
    own = Path("first/r08.safetensors")
    before = own.read_bytes()
    succeeds("refit", "first/r08.onnx", "--scale", 0.5, "--no-verify")
    assert own.read_bytes() != before
    succeeds("refit", "first/r08.onnx", "--scale", 0.1, "--no-verify")
    assert own.read_bytes() == before


@pytest.mark.parametrize(
    "engine, says",
    [
        ("r12.onnx", ("r12.onnx", "no such file")),
        ("r04.onnx", ("r04.onnx has no weights of its own",)),
        ("manifest.json", (".plan and .onnx engines",)),
        ("nowhere/r08.plan", ("nowhere/r08.plan", "no such file")),
    ],
)
def test_what_can_t_be_refitted(fails: Run, bundle: Path, bank_file: Path, engine: str, says):
    fails("refit", bundle / engine, "--bank", bank_file, "--scale", 0.3, says=says)


def test_a_graph_outside_a_bundle(fails: Run, bundle: Path, bank_file: Path, here: Path):
    (here / "r08.onnx").write_bytes((bundle / "r08.onnx").read_bytes())
    fails("refit", "r08.onnx", "--bank", bank_file, says=("is not a bundle",))
    (bundle / "copy.onnx").write_bytes((bundle / "r08.onnx").read_bytes())
    says = ("copy.onnx is no engine of the bundle", "r04.onnx, r08.onnx")
    fails("refit", bundle / "copy.onnx", "--bank", bank_file, says=says)


def test_options_that_don_t_fit(fails: Run, bundle: Path, bank_file: Path):
    engine = bundle / "r08.onnx"
    fails("refit", engine, "--out", "x.onnx", says=("--out is for plans",))
    fails("refit", engine, says=("tiny has no bank of its own",))
    fails("refit", engine, "--bank", "nowhere.safetensors", says=("nowhere.safetensors",))


@pytest.mark.parametrize("missing", [("torch",), ("timm",), ("onnxruntime", "openvino")])
def test_without_what_verifies(
    succeeds: Run, fails: Run, bundle: Path, bank_file: Path, monkeypatch, missing: tuple[str, ...]
):
    monkeypatch.setattr(
        "tocom_export.refitting.is_installed", lambda *names: not {*missing} & {*names}
    )
    options = (bundle / "r08.onnx", "--bank", bank_file)
    says = ("--verify needs torch, timm and onnxruntime", "'tocom-export[cpu,torch]'")
    fails("refit", *options, "--verify", says=says)
    check = json.loads(succeeds("refit", *options, "--json").stdout)["check"]
    if "onnxruntime" in missing:
        assert check is None
    else:  # it was run all the same
        assert (check["finite"], check["max_difference"]) == (True, None)


def test_a_plan_without_its_record(fails: Run, bundle: Path, bank_file: Path):
    (bundle / "r08.plan").write_bytes(b"plan")
    says = ("r08.plan has no r08.plan.json beside it", "build --backend tensorrt")
    fails("refit", bundle / "r08.plan", "--bank", bank_file, says=says)


def test_all_variants_at_once(succeeds: Run, fails: Run, bundle: Path, bank_file: Path):
    """Of another scale, or of another model with all its weights."""
    result = succeeds("refit", bundle, "--bank", bank_file, "--scale", 0.3, "--json")
    (first, second) = json.loads(result.stdout)["engines"]
    assert [first["variant"], second["variant"]] == ["r04", "r08"]
    assert {first["scale"], second["scale"]} == {0.3}
    assert second["check"]["passed"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["refitted"] == ["r04", "r08"]
    assert "Refitted 2 engines" in result.stderr
    succeeds("inspect", bundle)  # whose hashes it compares
    fails("refit", bundle, "--host-code", says=("--host-code is for plans",))


def test_all_weights_of_another_model(
    succeeds: Run, bundle: Path, bank_file: Path, checkpoint: Path, info: ModelInfo
):
    tensors = load_file(checkpoint)
    tensors["head.bias"] += 1
    save_file(tensors, "other.safetensors", to_metadata(info))
    succeeds("refit", bundle, "--checkpoint", "other.safetensors", "--bank", bank_file)
    stored = load_file(bundle / "weights.safetensors")
    np.testing.assert_array_equal(stored["head.bias"], tensors["head.bias"])

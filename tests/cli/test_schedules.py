"""Variants with a degree per layer: built, and taken by every command that takes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bake import bake
from tocom_export.compression.rules import list_degrees
from tocom_export.compression.schedule import Schedule
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.model.spec import VitSpec

Run = Callable[..., Result]
Options = tuple[object, ...]
FAST = (6, 3, 1, 0)
"""Of 17 tokens, it leaves 11, 8, 7 and 7."""


@pytest.fixture
def mixed(succeeds: Run, checkpoint: Path, bank_file: Path, tmp_path: Path) -> Path:
    """A bundle of constant degrees and of a schedule, verified as it is built."""
    options = ("--checkpoint", checkpoint, "--bank", bank_file, "--out", tmp_path / "mixed")
    succeeds("build", *options, "--targets", "0,8,16", "--schedule", "fast=6,3,1,0")
    return tmp_path / "mixed"


def document(result: Result) -> Any:
    return json.loads(result.stdout)


def test_what_is_built(mixed: Path, spec: VitSpec):
    bundle = Bundle.open(mixed, hashes=True)
    assert list(bundle.variants) == ["r00", "r08", "r16", "fast"]
    fast = bundle.variant("fast")
    assert (fast.degrees, fast.targets) == (FAST, Schedule.of(spec, FAST).targets)
    assert (fast.source, fast.scale, fast.compensated) == (4, 0.1, True)
    assert {"fast.onnx", "fast.safetensors"} <= {*bundle.files}


def test_each_layer_is_compensated_for_the_tokens_that_reach_it(mixed: Path, bank_file: Path):
    from tocom_export.compression.bank import ToComBank
    from tocom_export.compression.checkpoint import Checkpoint

    bundle = Bundle.open(mixed)
    shared = Checkpoint.open(mixed / "weights.safetensors").tensors
    wanted = bake(shared, bundle.spec, ToComBank.load(bank_file), bundle.variant("fast"))
    found = Checkpoint.open(mixed / "fast.safetensors").tensors
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(found[name], weight)


def test_what_build_says(succeeds: Run, model: Options):
    options = (*model, "--targets", "8", "--schedule", "fast=6,3,1,0", "--schedule", "slow=0,0,0,1")
    text = succeeds("build", *options, "--out", "out").stdout
    (row,) = (line.split() for line in text.splitlines() if line.startswith("fast "))
    assert row[:4] == ["fast", "17", "→", "7"]
    found = document(succeeds("build", *options, "--out", "out", "--force", "--json"))
    eight, fast, slow = found["variants"]
    assert [variant["variant"] for variant in found["variants"]] == ["r08", "fast", "slow"]
    assert (fast["degrees"], fast["tokens"]) == ([*FAST], [11, 8, 7, 7])
    assert eight["macs"] < fast["macs"] < slow["macs"]
    assert Path(fast["graph"]) == Path("out/fast.onnx")


def test_a_schedule_of_a_file(succeeds: Run, model: Options, here: Path):
    (here / "fast.json").write_text(json.dumps(FAST))
    options = (*model, "--targets", "8")
    succeeds("build", *options, "--schedule", "fast=fast.json", "--out", "file")
    succeeds("build", *options, "--schedule", "fast=6,3,1,0", "--out", "list")
    manifests = [(here / name / "manifest.json").read_text() for name in ("file", "list")]
    assert manifests[0] == manifests[1]


def test_a_rule_is_the_list_that_it_makes(succeeds: Run, model: Options, spec: VitSpec, here: Path):
    label = ",".join(map(str, list_degrees(spec, "every:2:4")))
    options = (*model, "--targets", "8")
    succeeds("build", *options, "--schedule", "fast=every:2:4", "--out", "rule")
    succeeds("build", *options, "--schedule", f"fast={label}", "--out", "list")
    manifests = [(here / name / "manifest.json").read_text() for name in ("rule", "list")]
    assert manifests[0] == manifests[1]
    rows = [line.split() for line in succeeds("inspect", "rule").stdout.splitlines()]
    assert ["fast", label] in [row[:2] for row in rows]


def test_a_dry_run_names_its_files(succeeds: Run, model: Options, here: Path):
    options = (*model, "--targets", "8", "--schedule", "fast=6,3,1,0", "--dry-run", "--json")
    found = document(succeeds("build", *options))
    assert {"fast.onnx", "fast.safetensors"} <= {*found["files"]}
    assert found["degrees"] == {"r08": [8] * 4, "fast": [6, 3, 1, 0]}
    said = succeeds("build", *model, "--schedule", "fast=6,3,1,0", "--dry-run").stderr
    assert said.splitlines()[1:] == ["fast would remove 6,3,1,0 tokens, layer by layer."]
    plans = document(succeeds("build", *options, "--backend", "tensorrt"))
    assert {"fast.plan", "fast.plan.json"} <= {*plans["files"]}
    assert (
        "--onnx=tiny-source4/fast.onnx --saveEngine=tiny-source4/fast.plan" in (plans["trtexec"][1])
    )


def test_inspect(succeeds: Run, mixed: Path):
    rows = [line.split() for line in succeeds("inspect", mixed).stdout.splitlines()]
    assert ["fast", "6,3,1,0", "4", "0.1", "17", "→", "7"] in [row[:7] for row in rows]
    text = succeeds("inspect", mixed, "--layers").stdout
    assert "11 8 7 7" in text
    targets = Bundle.open(mixed).variant("fast").targets
    assert ["fast", *(f"{target:.3g}" for target in targets)] in [
        line.split() for line in text.splitlines()
    ]
    metadata = document(succeeds("inspect", mixed / "fast.onnx", "--json"))["metadata"]
    assert metadata["variant"] == "fast"
    assert json.loads(metadata["degrees"]) == [*FAST]
    assert json.loads(metadata["targets"]) == [*targets]
    own = document(succeeds("inspect", mixed / "fast.safetensors", "--json"))
    assert own["variant"] == "fast"


def test_verify(succeeds: Run, fails: Run, mixed: Path):
    found = document(succeeds("verify", mixed, "--json"))["engines"]
    assert [engine["engine"] for engine in found][-1] == "fast.onnx"
    assert all(engine["passed"] and engine["agreement"] == 100 for engine in found)
    assert "fast.onnx" in fails("verify", mixed, "--atol", 0, says=("fast.onnx",), status=1).stderr


def test_run(succeeds: Run, fails: Run, mixed: Path, photos: Path):
    file = photos / "a" / "0.png"
    (image,) = document(succeeds("run", mixed, "--variant", "fast", file, "--json"))["images"]
    assert (image["file"], image["variant"]) == (str(file), "fast")
    bundle = Bundle.open(mixed)
    logits = OnnxEngine(bundle, "fast").run(bundle.preprocess.load_batch([file], (32, 32)))[0]
    assert image["classes"][0]["index"] == logits.argmax()
    assert "tiny, fast" in succeeds("run", mixed, "--variant", "fast", file).stdout
    fails("run", mixed, "--variant", "faster", file, says=("faster", "r00, r08, r16, fast"))


@pytest.mark.parametrize("options", [("--scale", 0.05), ("--bank", "none")])
def test_refit(succeeds: Run, mixed: Path, bank_file: Path, options: Options):
    own = mixed / "fast.safetensors"
    before = own.read_bytes()
    found = document(
        succeeds("refit", mixed / "fast.onnx", "--bank", bank_file, *options, "--json")
    )
    assert (found["variant"], found["degrees"]) == ("fast", [*FAST])
    assert found["check"]["passed"] is True
    assert own.read_bytes() != before
    bundle = Bundle.open(mixed, hashes=True)
    fast = bundle.variant("fast")
    assert (fast.name, fast.degrees, bundle.refitted) == ("fast", FAST, ("fast",))
    assert (fast.scale, fast.source) == (found["scale"], found["source"])
    succeeds("verify", mixed)
    back = ("--scale", 0.1, "--source", 4, "--bank", bank_file)
    succeeds("refit", mixed / "fast.onnx", *back)
    assert own.read_bytes() == before
    succeeds("verify", mixed)


def test_a_plan(nvidia: Any, succeeds: Run, fails: Run, model: Options, bank_file: Path):
    options = ("--targets", "8", "--schedule", "fast=6,3,1,0", "--backend", "tensorrt")
    succeeds("build", *model, *options, "--out", "out")
    assert Bundle.open(Path("out")).plans == ("r08", "fast")
    shown = succeeds("inspect", "out/fast.plan").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["variant", "fast"] in rows
    assert ["degree", "6,3,1,0"] in rows
    refit = ("refit", "out/fast.plan", "--bank", bank_file, "--scale", 0.2, "--no-verify")
    found = document(succeeds(*refit, "--json"))
    assert (found["engine"], found["variant"], found["scale"]) == ("out/fast.plan", "fast", 0.2)
    shown = succeeds("inspect", "out/fast.plan").stdout
    assert ["compensated", "yes,", "scale", "0.2"] in [line.split() for line in shown.splitlines()]


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "fast",
            "'fast' is not NAME=20,17,11,6,1,3, nor NAME=every:3, nor NAME=keep:0.5, nor NAME=",
        ),
        ("fast=", "'fast=' is not NAME="),
        ("=6,3,1,0", "'=6,3,1,0' is not NAME="),
        ("fast=6,3,x,0", "'6,3,x,0' is neither a list of degrees"),
        ("fast=6,,3,0", "'6,,3,0' is neither a list of degrees"),
        ("fast=.", "nor a .json file"),
        ("fast=every:", "'every:' is not every:K or every:K:R; K is 1 or more"),
        ("fast=every:0", "'every:0' is not every:K or every:K:R"),
        ("fast=every:3:99", "'every:3:99' is not every:K or every:K:R"),
        ("fast=keep:2", "'keep:2' is not keep:SHARE"),
        ("fast=every:9", "fast: every:9:16: with tokens removed in 1 of its 4 layers tiny has"),
        ("fast=6,3,1", "fast: tiny has 4 layers; a degree is needed for each, not 3"),
        ("fast=8", "fast: tiny has 4 layers; a degree is needed for each, not 1"),
        ("fast=6,3,1,-1", "fast: degree -1: 0 to 1000000 is expected"),
        ("fast=6,3,1,10000000000000000000000", "fast: degree 10000000000000000000000: 0 to"),
        ("r08=6,3,1,0", "r08 is the name of degree 8 in each layer; choose another"),
        ("weights=6,3,1,0", "'weights' can't name a variant"),
        ("2fast=6,3,1,0", "'2fast' can't name a variant: a letter first"),
        ("a/b=6,3,1,0", "'a/b' can't name a variant"),
        (f"{'a' * 65}=6,3,1,0", "64 at most"),
    ],
)
def test_what_is_no_schedule(fails: Run, model: Options, here: Path, text: str, says: str):
    fails("build", *model, "--schedule", text, says=("--schedule", says))
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "fast.json: can't be read: No such file"),
        ("[6, 3", "fast.json is no list of degrees: no JSON"),
        ("", "fast.json is no list of degrees: no JSON"),
        ('{"degrees": [6, 3, 1, 0]}', "fast.json is no list of degrees: expected array"),
        ('[6, 3, "1", 0]', "fast.json is no list of degrees: [2]: expected int, got str"),
        ("[6, 3, 1.5, 0]", "[2]: expected int, got float"),
        ("[6, 3, 1, NaN]", "no JSON"),
        ("[6, 3, 1]", "fast: tiny has 4 layers"),
        ("[]", "fast: tiny has 4 layers; a degree is needed for each, not 0"),
    ],
)
def test_a_file_that_is_no_schedule(
    fails: Run, model: Options, here: Path, content: str | None, says: str
):
    if content is not None:
        (here / "fast.json").write_text(content)
    fails("build", *model, "--schedule", "fast=fast.json", says=("--schedule", says))
    assert not [path for path in here.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "schedules, says",
    [
        (("a=6,3,1,0", "a=6,3,1,1"), "--schedule a is given twice"),
        (("a=6,3,1,0", "A=6,3,1,1"), "A is asked for twice"),  # one file on some file systems
        (("r08=8,8,8,8",), "r08 is asked for twice; choose another name"),
    ],
)
def test_one_name_for_two(
    fails: Run, model: Options, here: Path, schedules: tuple[str, ...], says: str
):
    options = [text for schedule in schedules for text in ("--schedule", schedule)]
    fails("build", *model, "--targets", "8", *options, says=(says,))
    assert not list(here.iterdir())

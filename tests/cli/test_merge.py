"""Merging for the MLP alone on the command line: --merge ffn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule

Run = Callable[..., Result]
FFN = Method("tome", merge="ffn")


@pytest.fixture
def within(bank_file: Path, here: Path) -> Path:
    """The bank as one that was trained for it."""
    dataclasses.replace(ToComBank.load(bank_file), method=FFN).save(here / "within.safetensors")
    return here / "within.safetensors"


def test_a_bundle_of_it(succeeds: Run, fails: Run, checkpoint: Path, within: Path, photos: Path):
    outputs = ("--output", "tokens", "--output", "logits")
    options = ("--checkpoint", checkpoint, "--bank", within, "--targets", "0,8", *outputs,
               "--schedule", "mixed=3,0,8,1")  # fmt: skip
    document = json.loads(succeeds("build", *options, "--out", "b", "--json").stdout)
    assert document["method"] == "tome within the FFN"  # the bank's, which nobody has to name
    assert all(variant["check"]["passed"] for variant in document["variants"])
    bundle = Bundle.open("b", hashes=True)
    assert (bundle.method, bundle.variant("mixed").targets) == (FFN, (3, 3, 1.5, 11 / 3))
    assert bundle.variant(8).schedule(bundle.spec).tokens_out == (9,) * 4
    assert "tome within the FFN" in succeeds("inspect", "b").stdout
    assert "tome within the FFN" in succeeds("inspect", within).stdout
    succeeds("verify", "b")
    succeeds("run", "b", "--variant", 8, photos, "--output", "tokens", "t")
    assert np.load("t.npy").shape == (12, 16, 64)
    fails(
        "build", *options[:-2], "--merge", "block", "--out", "c",
        says=("the bank has method tome within the FFN, but tiny is to have tome;",),
    )  # fmt: skip


def test_what_can_t_be(fails: Run, model: tuple[object, ...], here: Path):
    plain = (*model[:2], "--bank", "none", "--merge", "ffn")
    says = ("has method tome, but tiny is to have tome within the FFN", "--bank none")
    fails("build", *model, "--merge", "ffn", says=says)
    fails("build", *plain, "--method", "evit", says=("--merge ffn: evit drops tokens",))
    fails(
        "build", *plain, "--keep", "0.5", says=("keep50: keep:0.5", "--merge ffn", "list a degree")
    )
    fails(
        "build", *plain, "--output", "map", "--output", "tokens", says=("--merge ffn each patch",)
    )
    assert not list(here.iterdir())


def test_a_bank_is_trained_and_measured(succeeds: Run, fails: Run, checkpoint: Path, bundle: Path,
                                        photos: Path, labelled: Callable[..., Path]):  # fmt: skip
    train = ("train", "--checkpoint", checkpoint, "--data", photos, "--epochs", 1, "--batch", 4,
             "--merge", "ffn")  # fmt: skip
    succeeds(*train, "--out", "made.safetensors")
    assert ToComBank.load("made.safetensors").method == FFN
    says = (f"--schedules {bundle}: its --merge is block, the bank's is ffn",)
    fails(*train, "--schedules", bundle, "--out", "other.safetensors", says=says)
    data = labelled("moons", [0] * 48)
    options = (checkpoint, "--data", data, "--targets", "0,8")
    result = succeeds("evaluate", *options, "--bank", "made.safetensors")
    assert "tome within the FFN" in result.stdout
    named = succeeds("evaluate", *options, "--bank", "none", "--merge", "ffn", "--json")
    assert len(json.loads(named.stdout)["rows"]) == 2


def test_a_model_is_trained_with_it(succeeds: Run, checkpoint: Path, photos: Path):
    succeeds("finetune", "--checkpoint", checkpoint, "--data", photos, "--epochs", 1, "--batch", 4,
             "--merge", "ffn", "--source", 8, "--out", "tuned.safetensors")  # fmt: skip
    assert Checkpoint.open("tuned.safetensors").info.method == FFN
    succeeds("build", "--checkpoint", "tuned.safetensors", "--bank", "none", "--out", "b")
    assert Bundle.open("b").method == FFN


def test_schedules_are_looked_for(succeeds: Run, checkpoint: Path, photos: Path, pictures: Any,
                                  here: Path):  # fmt: skip
    succeeds("build", "--checkpoint", checkpoint, "--bank", "none", "--merge", "ffn", "--targets",
             "0", "--no-verify", "--out", "b")  # fmt: skip
    folder = here / "pictures"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        (folder / f"{number}.png").write_bytes(picture)
    succeeds("tune", "b", "--images", folder, "--macs", "0.9", "--trials", 8)
    bundle = Bundle.open("b")
    (found,) = (v for name, v in bundle.variants.items() if name != "r00")
    assert found.merge == "ffn"
    dense = Schedule.of(bundle.spec, 0).macs(bundle.spec)
    assert found.schedule(bundle.spec).macs(bundle.spec) <= 0.9 * dense

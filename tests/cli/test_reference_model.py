"""The model that ships inside the package: built, run and verified without an option."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.model.catalogue import REFERENCE_BANKS, REFERENCE_CHECKPOINT

Run = Callable[..., Result]
INFO = Checkpoint.open(REFERENCE_CHECKPOINT).info


@pytest.fixture
def files(here: Path) -> list[Path]:
    """Three photographs of nothing."""
    rng = np.random.default_rng(0)
    for number, size in enumerate([(32, 32), (48, 64), (100, 20)]):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(here / f"{number}.png")
    return sorted(here.glob("*.png"))


def test_build_without_an_option(succeeds: Run, here: Path):
    document = json.loads(succeeds("build", "--no-verify", "--json").stdout)
    assert document["bundle"] == "reference-source0"
    assert document["model"] == "reference"
    assert {variant["source"] for variant in document["variants"]} == {0}
    assert [variant["compensated"] for variant in document["variants"]] == [False] + [True] * 4
    bundle = Bundle.open(here / "reference-source0", hashes=True)
    spec = bundle.spec
    assert (spec.image_size, spec.patch_size, spec.depth) == ((48, 48), (6, 6), 6)
    assert bundle.classes == INFO.classes
    assert bundle.variant(16).schedule(spec).tokens_out == (49, 33, 17, 9, 5, 3)
    assert list(bundle.variants) == ["r00", "r04", "r08", "r12", "r16"]
    costs = [variant["macs"] for variant in document["variants"]]
    assert costs == sorted(costs, reverse=True)


def test_the_model_by_name_is_the_default(succeeds: Run, here: Path):
    options = ("--targets", "8", "--no-verify")
    succeeds("build", *options, "--out", "default")
    succeeds("build", *options, "--model", "reference", "--source", "0", "--out", "named")
    default, named = ((here / name / "manifest.json").read_text() for name in ("default", "named"))
    assert default == named


def test_merging_seldom(succeeds: Run, fails: Run, files: list[Path], here: Path):
    succeeds("build", "--targets", "16", "--schedule", "fast=every:2", "--out", "out")
    bundle = Bundle.open(here / "out")
    fast, constant = bundle.variant("fast"), bundle.variant(16)
    assert fast.degrees == (32, 0, 16, 0, 8, 0)
    costs = [variant.schedule(bundle.spec).macs(bundle.spec) for variant in (fast, constant)]
    assert costs[0] <= costs[1]
    found = json.loads(succeeds("run", "out", "--variant", "fast", *files, "--json").stdout)
    assert [image["variant"] for image in found["images"]] == ["fast"] * 3
    says = ("--schedule fast: every:3:16: with", "choose every:2:16 or every:3:12")
    fails("build", "--schedule", "fast=every:3", "--out", "other", says=says)


def test_run_on_a_few_images(succeeds: Run, files: list[Path]):
    succeeds("build", "--targets", "0,8", "--no-verify")
    options = ("reference-source0", "--variant", "r08", *files)
    images = json.loads(succeeds("run", *options, "--json").stdout)["images"]
    assert [image["file"] for image in images] == [str(file) for file in files]
    for image in images:
        names = [top["name"] for top in image["classes"]]
        assert len(set(names)) == 5
        assert set(names) <= set(INFO.classes)
        shares = [top["probability"] for top in image["classes"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1 + 1e-6


def test_every_degree_passes_verification(succeeds: Run):
    document = json.loads(succeeds("build", "--targets", "0,4,8,12,16", "--json").stdout)
    assert len(document["variants"]) == 5
    for variant in document["variants"]:
        assert variant["check"]["passed"] is True
        assert variant["check"]["agreement"] == 100


@pytest.mark.parametrize("method", ["tome", "evit"])
def test_each_method_has_a_bank_made_for_the_model(method: str):
    bank = ToComBank.load(REFERENCE_BANKS[method])
    assert (bank.model, bank.method.name) == ("reference", method)
    bank.check(INFO.spec, bank.method)
    assert all(factor.any() for factor in bank.factors().values())


def test_pruning_takes_the_bank_of_its_method(succeeds: Run, here: Path):
    options = ("--method", "evit", "--targets", "16", "--no-verify")
    succeeds("build", *options, "--out", "default")
    succeeds("build", *options, "--out", "named", "--bank", REFERENCE_BANKS["evit"])
    weights = [(here / name / "r16.safetensors").read_bytes() for name in ("default", "named")]
    assert weights[0] == weights[1]


def test_the_package_stays_small():
    assets = REFERENCE_CHECKPOINT.parent.iterdir()
    assert sum(file.stat().st_size for file in assets) <= 16e6


def test_its_checkpoint_needs_no_metadata_from_elsewhere():
    checkpoint = Checkpoint.open(REFERENCE_CHECKPOINT)
    assert checkpoint.check(checkpoint.info.spec) == checkpoint.info.spec
    assert checkpoint.info.preprocess is not None
    assert len(checkpoint.info.classes) == checkpoint.info.spec.classes == 200
    assert "goldfish" in checkpoint.info.classes

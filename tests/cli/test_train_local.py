"""``train --from`` and ``--schedules``: a bank for one model, on images without labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from tocom_export.compression.bank import ToComBank

Run = Callable[..., Result]
Options = tuple[object, ...]


@pytest.fixture
def loose(photos: Path, tmp_path: Path) -> Path:
    """The photos without their classes."""
    folder = tmp_path / "loose"
    folder.mkdir()
    for file in photos.glob("*/*.png"):
        shutil.copy(file, folder / f"{file.parent.name}-{file.name}")
    return folder


@pytest.fixture
def local(checkpoint: Path, loose: Path) -> Options:
    """Of a model of source 4, two epochs of three steps."""
    steps = ("--epochs", 2, "--batch", 4, "--workers", 0, "--lr", 0.01)
    return ("train", "--checkpoint", checkpoint, "--data", loose, *steps)


def test_a_bank_is_gone_on_with(succeeds: Run, local: Options, bank_file: Path, here: Path):
    succeeds(*local, "--from", bank_file, "--out", "local.safetensors")
    before, after = ToComBank.load(bank_file), ToComBank.load(here / "local.safetensors")
    assert (after.rank, after.arithmetic, after.method) == (before.rank, "steps", before.method)
    change = np.linalg.norm(after.q_up - before.q_up) / np.linalg.norm(before.q_up)
    assert 0 < change < 0.5
    succeeds("build", *local[1:3], "--bank", "local.safetensors", "--targets", 8, "--no-verify")


def test_from_zero_only_steps_from_the_source_on_are_trained(
    succeeds: Run, local: Options, here: Path
):
    succeeds(*local, "--from", "zero", "--out", "local.safetensors")
    bank = ToComBank.load(here / "local.safetensors")
    assert bank.rank == 2
    assert bank.q_up.any()


def test_for_the_variants_of_a_bundle_alone(
    succeeds: Run, local: Options, bundle: Path, here: Path
):
    """Its variants are of degrees 4, the source, and 8, so that steps beyond stay as they were."""
    succeeds(*local, "--from", "zero", "--schedules", bundle, "--out", "local.safetensors")
    bank = ToComBank.load(here / "local.safetensors")
    assert bank.v_up[:, 4:8].any(axis=(2, 3)).all()
    assert not bank.v_up[:, :4].any()
    assert not bank.v_up[:, 8:].any()


def test_another_start_is_another_run(
    run: Run, succeeds: Run, fails: Run, local: Options, bank_file: Path, stops: Callable
):
    with stops(1):
        assert run(*local, "--from", bank_file).exit_code == 130
    fails(*local, "--from", "zero", says=("bank.safetensors.state",))
    succeeds(*local, "--from", bank_file)


def test_the_number_of_epochs_follows_the_images(
    succeeds: Run, checkpoint: Path, loose: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tocom_export.training.local_bank.LOCAL_STEPS", 7)
    options = ("--checkpoint", checkpoint, "--data", loose, "--batch", 4, "--workers", 0)
    told = succeeds("train", *options, "--from", "zero").stderr
    assert "step 6/6 loss" in told  # two epochs of three steps


def test_what_a_local_bank_gives_is_told_without_labels(succeeds: Run, local: Options, loose: Path):
    result = succeeds(*local, "--from", "zero", "--val", loose, "--json")
    pairs = json.loads(result.stdout)["val"]["pairs"]
    assert [(pair["source"], pair["target"]) for pair in pairs] == [(4, 0), (4, 8), (4, 16)]
    assert all(pair["accuracy"] is None for pair in pairs)
    assert f"--val {loose} has no labels. Accuracy is left out." in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--from", "BANK", "--rank", 5), ("--rank 5", "--from has 2")),
        (("--from", "BANK", "--arithmetic", "shared"), ("--arithmetic shared", "has steps")),
        (("--from", "BANK", "--method", "evit"), ("--from", "method")),
        (("--from", "nowhere.safetensors"), ("nowhere.safetensors",)),
        (("--schedules", "nowhere"), ("nowhere",)),
    ],
)
def test_what_cannot_be_begun_with(
    fails: Run, local: Options, bank_file: Path, options: tuple[Any, ...], says: tuple[str, ...]
):
    given = (bank_file if option == "BANK" else option for option in options)
    fails(*local, *given, says=says)


def test_a_bundle_of_another_model(fails: Run, succeeds: Run, local: Options, tmp_path: Path):
    other = tmp_path / "other"
    succeeds("build", "--targets", 8, "--out", other, "--no-verify")
    fails(*local, "--schedules", other, says=("--schedules", "tokens 65", "tiny has 17"))


def test_a_bundle_that_compensates_for_nothing(
    fails: Run, succeeds: Run, local: Options, model: Options, tmp_path: Path
):
    succeeds("build", *model, "--targets", 4, "--out", tmp_path / "bundle")
    fails(*local, "--schedules", tmp_path / "bundle", says=("--schedules", "degree 4"))

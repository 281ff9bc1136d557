from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tocom_export.bank import ToComBank
from tocom_export.training.data import TrainData

Run = Callable[..., Result]
Options = tuple[object, ...]


@pytest.fixture
def recipe(photos: Path) -> Options:
    """Two epochs of three steps."""
    return ("--data", photos, "--epochs", 2, "--batch", 4, "--workers", 0)


def test_a_bank_that_build_takes(succeeds: Run, checkpoint: Path, recipe: Options, here: Path):
    options = ("--checkpoint", checkpoint, *recipe, "--rank", 3, "--out", "bank.safetensors")
    result = succeeds("train", *options, "--json")
    parameters = 4 * 2 * 16 * 2 * 64 * 3
    assert json.loads(result.stdout) == {
        "bank": "bank.safetensors", "model": "tiny", "parameters": parameters,
    }  # fmt: skip
    assert "step 6/6 loss" in result.stderr
    bank = ToComBank.load(here / "bank.safetensors")
    assert (bank.model, bank.method.name, bank.rank) == ("tiny", "tome", 3)
    assert bank.q_up.any()
    assert sorted(p.name for p in here.iterdir()) == ["bank.safetensors", "bank.safetensors.csv"]
    model = ("--checkpoint", checkpoint, "--bank", "bank.safetensors")
    succeeds("build", *model, "--targets", "8", "--no-verify")


def test_a_bank_for_pruning(succeeds: Run, checkpoint: Path, recipe: Options, here: Path):
    succeeds("train", "--checkpoint", checkpoint, *recipe, "--method", "evit")
    assert ToComBank.load(here / "bank.safetensors").method.name == "evit"


@pytest.mark.parametrize("stopped_in", [0, 1])
def test_a_stopped_run_is_continued(
    run: Run, succeeds: Run, checkpoint: Path, recipe: Options, here: Path,
    monkeypatch: pytest.MonkeyPatch, stopped_in: int,
):  # fmt: skip
    epochs = TrainData.epoch

    def stop(self: TrainData, epoch: int, first: int = 0) -> object:
        if epoch == stopped_in:
            raise KeyboardInterrupt
        return epochs(self, epoch, first)

    options = ("train", "--checkpoint", checkpoint, *recipe)
    succeeds(*options, "--out", "whole.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(TrainData, "epoch", stop)
        result = run(*options, "--out", "broken.safetensors")
    assert result.exit_code == 130
    assert result.stderr.endswith("Stopped.\n")
    assert not (here / "broken.safetensors").exists()

    result = succeeds(*options, "--out", "broken.safetensors")
    steps = [line for line in result.stderr.splitlines() if " loss " in line]
    assert len(steps) == 6 - 3 * stopped_in
    assert ("continues after step 3 of 6" in result.stderr) is bool(stopped_in)
    broken, whole = (here / f"{name}.safetensors" for name in ("broken", "whole"))
    assert broken.read_bytes() == whole.read_bytes()
    assert not list(here.glob("*.state"))


def test_a_state_of_another_recipe(
    run: Run, fails: Run, checkpoint: Path, recipe: Options, monkeypatch: pytest.MonkeyPatch
):
    epochs = TrainData.epoch

    def stop(self: TrainData, epoch: int, first: int = 0) -> object:
        if epoch:
            raise KeyboardInterrupt
        return epochs(self, epoch, first)

    options = ("train", "--checkpoint", checkpoint, *recipe)
    with monkeypatch.context() as patched:
        patched.setattr(TrainData, "epoch", stop)
        run(*options)
    fails(*options, "--lr", "0.5", says=("bank.safetensors.state", "another recipe"))


def test_a_loss_that_is_not_finite(fails: Run, checkpoint: Path, recipe: Options, here: Path):
    options = ("--checkpoint", checkpoint, *recipe, "--scale", "1e30", "--lr", "1e30")
    fails_with = fails("train", *options, "-q", says=("loss", "step"), status=1)
    assert "learning rate" in fails_with.stderr
    assert not (here / "bank.safetensors").exists()


@pytest.mark.parametrize("folder", ["none", "empty", "class", "image"])
def test_data_that_cannot_be_used(fails: Run, checkpoint: Path, tmp_path: Path, folder: str):
    data = tmp_path / folder
    if folder != "none":
        data.mkdir()
    if folder == "class":  # a class without an image
        (data / "a").mkdir()
    if folder == "image":  # images without a class
        (data / "a.png").touch()
    fails("train", "--checkpoint", checkpoint, "--data", data, says=(data,))


def test_fewer_images_than_a_batch(fails: Run, checkpoint: Path, photos: Path):
    options = ("--checkpoint", checkpoint, "--data", photos, "--batch", 13)
    fails("train", *options, says=(photos, "12 images", "batch of 13"))


def test_no_data(fails: Run, checkpoint: Path):
    fails("train", "--checkpoint", checkpoint, says=("--data",))


def test_an_augmentation_that_is_none(fails: Run, checkpoint: Path, recipe: Options):
    options = ("--checkpoint", checkpoint, *recipe, "--augment", "nonsense")
    fails("train", *options, says=("--augment", "nonsense"))


def test_a_folder_that_is_not_there_yet(succeeds: Run, checkpoint: Path, recipe: Options):
    succeeds("train", "--checkpoint", checkpoint, *recipe, "--out", "new/bank.safetensors")
    assert ToComBank.load(Path("new/bank.safetensors")).model == "tiny"


def test_a_folder_that_cannot_be_written(
    fails: Run, checkpoint: Path, recipe: Options, tmp_path: Path
):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "bank.safetensors"
    says = (tmp_path / "file", "can't be written")
    fails("train", "--checkpoint", checkpoint, *recipe, "--out", out, says=says)


def test_a_full_disk(
    fails: Run, checkpoint: Path, recipe: Options, here: Path, files_end_at: Callable
):
    options = ("--checkpoint", checkpoint, *recipe, "-q")
    with files_end_at(50_000):  # a bank and its optimiser need more
        fails("train", *options, says=("bank.", "can't be written"))
    assert not [p.name for p in here.iterdir() if p.suffix != ".csv"]


@pytest.mark.parametrize("name", ["bank.pth", "bank", "bank.state"])
def test_an_output_that_build_would_not_read(
    fails: Run, checkpoint: Path, recipe: Options, here: Path, name: str
):
    options = ("--checkpoint", checkpoint, *recipe, "--out", name)
    fails("train", *options, says=("--out", name, ".safetensors"))
    assert list(here.iterdir()) == []


def test_without_torch(fails: Run, checkpoint: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tocom_export.cli.training.installed", lambda *_: False)
    options = ("--checkpoint", checkpoint, "--data", photos)
    fails("train", *options, says=("torch", "pip install 'tocom-export[torch]'"))


def test_a_truncated_checkpoint(fails: Run, checkpoint: Path, recipe: Options, tmp_path: Path):
    file = tmp_path / "half.safetensors"
    file.write_bytes(checkpoint.read_bytes()[:300_000])
    fails("train", "--checkpoint", file, *recipe, says=(file, "truncated"))


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_finished_result_is_not_replaced_unasked(fails: Run, command: str, here: Path):
    (here / "done.safetensors").write_bytes(b"a week of training")
    options = ("--data", "images", "--out", "done.safetensors")
    fails(command, *options, says=("--out done.safetensors exists", "--force"))
    assert (here / "done.safetensors").read_bytes() == b"a week of training"

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tocom_export.bundle import Bundle
from tocom_export.checkpoint import Checkpoint
from tocom_export.spec import VitSpec
from tocom_export.training.data import TrainData

Run = Callable[..., Result]
Options = tuple[object, ...]


@pytest.fixture
def recipe(photos: Path) -> Options:
    """Two epochs of three steps."""
    return ("--data", photos, "--epochs", 2, "--batch", 4, "--workers", 0)


def test_build_needs_no_more_options(
    succeeds: Run, checkpoint: Path, bank_file: Path, recipe: Options, photos: Path, here: Path
):
    options = ("--checkpoint", checkpoint, *recipe, "--source", 8, "--val", photos)
    result = succeeds("finetune", *options, "--json")
    document = json.loads(result.stdout)
    assert len(document.pop("accuracy")) == 2
    assert document == {
        "checkpoint": "finetuned.safetensors", "model": "tiny", "source": 8, "classes": ["a", "b"],
    }  # fmt: skip
    assert "epoch 2: accuracy" in result.stderr
    assert sorted(p.name for p in here.iterdir()) == [
        "finetuned.safetensors",
        "finetuned.safetensors.csv",
    ]
    info = Checkpoint.open(here / "finetuned.safetensors").info
    assert (info.source, info.classes, info.spec.classes) == (8, ("a", "b"), 2)

    options = ("--checkpoint", "finetuned.safetensors", "--bank", bank_file, "--no-verify")
    succeeds("build", *options)
    bundle = Bundle.open(here / "tiny-source8", hashes=True)
    assert (bundle.source, bundle.classes, bundle.spec.classes) == (8, ("a", "b"), 2)
    result = succeeds("run", "tiny-source8", "--target", 4, photos / "a" / "0.png", "--json")
    (image,) = json.loads(result.stdout)["images"]
    assert {top["class"] for top in image["top5"]} == {"a", "b"}


def test_from_scratch(succeeds: Run, recipe: Options, here: Path, spec: VitSpec):
    (here / "spec.json").write_text(json.dumps(spec.to_json()))
    options = ("--init", "random", "--model", "spec.json", *recipe, "--method", "evit")
    succeeds("finetune", *options, "--out", "new.safetensors", "--warmup", 1, "--clip", 1)
    info = Checkpoint.open(here / "new.safetensors").info
    assert (info.spec.model, info.spec.classes, info.source) == ("tiny", 2, 0)
    assert info.method.name == "evit"


def test_the_seed_decides(succeeds: Run, recipe: Options, here: Path, spec: VitSpec):
    (here / "spec.json").write_text(json.dumps(spec.to_json()))
    options = ("finetune", "--init", "random", "--model", "spec.json", *recipe)
    for out, seed in (("one", 1), ("same", 1), ("other", 2)):
        succeeds(*options, "--out", f"{out}.safetensors", "--seed", seed)
    one, same, other = (
        (here / f"{name}.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same != other


def test_a_stopped_run_is_continued(
    run: Run, succeeds: Run, checkpoint: Path, recipe: Options, here: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    epochs = TrainData.epoch

    def stop(self: TrainData, epoch: int, first: int = 0) -> object:
        if epoch == 1:
            raise KeyboardInterrupt
        return epochs(self, epoch, first)

    options = ("finetune", "--checkpoint", checkpoint, *recipe, "--source", 4)
    succeeds(*options, "--out", "whole.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(TrainData, "epoch", stop)
        assert run(*options, "--out", "broken.safetensors").exit_code == 130
    assert not (here / "broken.safetensors").exists()

    result = succeeds(*options, "--out", "broken.safetensors")
    assert len([line for line in result.stderr.splitlines() if " loss " in line]) == 3
    broken, whole = (here / f"{name}.safetensors" for name in ("broken", "whole"))
    assert broken.read_bytes() == whole.read_bytes()
    assert not list(here.glob("*.state"))


def test_a_checkpoint_with_a_random_start(fails: Run, checkpoint: Path, recipe: Options):
    options = ("--init", "random", "--checkpoint", checkpoint, *recipe)
    fails("finetune", *options, says=("--checkpoint", "--init random"))


@pytest.mark.parametrize("content", [None, "{", "[]", "3", '{"model": "x"}', '{"colour": 1}'])
def test_a_spec_that_is_none(fails: Run, recipe: Options, here: Path, content: str | None):
    if content is not None:
        (here / "spec.json").write_text(content)
    options = ("--init", "random", "--model", "spec.json", *recipe)
    fails("finetune", *options, says=("spec.json",))


def test_validation_images_that_are_not_there(
    fails: Run, checkpoint: Path, recipe: Options, here: Path
):
    options = ("--checkpoint", checkpoint, *recipe, "--val", "none")
    fails("finetune", *options, says=("none", "<folder>/<class>/<image>"))
    assert list(here.iterdir()) == []


def test_an_empty_class_of_validation_images(
    fails: Run, checkpoint: Path, recipe: Options, here: Path
):
    (here / "val" / "a").mkdir(parents=True)
    options = ("--checkpoint", checkpoint, *recipe, "--val", "val")
    fails("finetune", *options, says=("val",))


def test_a_folder_that_cannot_be_written(
    fails: Run, checkpoint: Path, recipe: Options, tmp_path: Path
):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out.safetensors"
    says = (tmp_path / "file", "can't be written")
    fails("finetune", "--checkpoint", checkpoint, *recipe, "--out", out, says=says)


def test_without_torch(fails: Run, photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tocom_export.cli.training.installed", lambda *_: False)
    fails("finetune", "--data", photos, says=("torch", "pip install 'tocom-export[torch]'"))

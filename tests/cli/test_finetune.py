from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.io.json_codec import encode
from tocom_export.model.resizing import resize_positions
from tocom_export.model.spec import VitSpec

Run = Callable[..., Result]
Started = Callable[..., dict[str, Any]]
Options = tuple[object, ...]


@pytest.fixture
def scratch(here: Path, spec: VitSpec, recipe: Options) -> Options:
    """``finetune`` from random weights."""
    (here / "spec.json").write_text(json.dumps(encode(spec)))
    return ("finetune", "--init", "random", "--model", "spec.json", *recipe)


def test_build_needs_no_more_options(
    succeeds: Run, checkpoint: Path, bank_file: Path, recipe: Options, photos: Path, here: Path,
    written: Callable,
):  # fmt: skip
    options = ("--checkpoint", checkpoint, *recipe, "--source", 8, "--val", photos)
    result = succeeds("finetune", *options, "--json")
    document = json.loads(result.stdout)
    accuracy = document.pop("accuracy_after_epoch")
    assert document == {
        "checkpoint": "finetuned.safetensors", "model": "tiny", "source": 8, "classes": ["a", "b"],
        "unreadable_images": 0,
    }  # fmt: skip
    told = [line for line in result.stderr.splitlines() if line.startswith("epoch ")]
    assert told == [f"epoch {n}: accuracy {accuracy[str(n)]:.2f} % on {photos}" for n in (1, 2)]
    last = "Wrote finetuned.safetensors: tiny with 2 classes, source 8."
    assert result.stderr.splitlines()[-1] == last
    assert written() == ["finetuned.safetensors", "finetuned.safetensors.csv"]
    info = Checkpoint.open(here / "finetuned.safetensors").info
    assert (info.source, info.classes, info.spec.classes) == (8, ("a", "b"), 2)

    measured = succeeds(
        "evaluate", "finetuned.safetensors", "--data", photos, "--bank", "none", "--targets", 8,
        "--json",
    )  # fmt: skip
    assert json.loads(measured.stdout)["rows"][0]["baseline"] == accuracy["2"]

    options = ("--checkpoint", "finetuned.safetensors", "--bank", bank_file, "--no-verify")
    succeeds("build", *options)
    bundle = Bundle.open(here / "tiny-source8", hashes=True)
    assert {variant.source for variant in bundle.variants.values()} == {8}
    assert (bundle.classes, bundle.spec.classes) == (("a", "b"), 2)
    result = succeeds("run", "tiny-source8", "--variant", 4, photos / "a" / "0.png", "--json")
    (image,) = json.loads(result.stdout)["images"]
    assert {top["name"] for top in image["classes"]} == {"a", "b"}


def test_accuracy_is_measured_at_the_source_degree(
    succeeds: Run, checkpoint: Path, recipe: Options, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    degrees = []

    def accuracy(_: object, __: object, degree: int) -> float:
        degrees.append(degree)
        return 12.5

    monkeypatch.setattr("tocom_export.training.torch_engine.evaluate_model", accuracy)
    options = ("--checkpoint", checkpoint, *recipe, "--source", 8, "--val", photos, "--json")
    document = json.loads(succeeds("finetune", *options).stdout)
    assert document["accuracy_after_epoch"] == {"1": 12.5, "2": 12.5}
    assert degrees == [8, 8]


FULL = {
    "epochs": 30, "batch": 6, "lr": pytest.approx(2e-4 * 6 / 64), "weight_decay": 0.05,
    "warmup_epochs": 5, "augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0,
    "erasing": 0.25, "label-smoothing": 0.1, "drop-path": pytest.approx(0.1),
    "adapter-scale": None, "flip": True,
}  # fmt: skip
ADAPTFORMER = {
    "epochs": 100, "batch": 6, "lr": pytest.approx(1e-3 * 6 / 64), "weight_decay": 1e-4,
    "warmup_epochs": 0, "augment": "none", "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0,
    "label-smoothing": 0.0, "drop-path": pytest.approx(0.1), "adapter-scale": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("tune, expected", [("full", FULL), ("adaptformer", ADAPTFORMER)])
def test_the_defaults_are_the_papers(
    started: Started, checkpoint: Path, photos: Path, tune: str, expected: dict[str, Any]
):
    options = ("--checkpoint", checkpoint, "--data", photos, "--batch", 6)
    found = started("finetune", *options, "--tune", tune)
    assert {name: found[name] for name in expected} == expected


def test_the_default_batch(fails: Run, checkpoint: Path, photos: Path):
    options = ("--checkpoint", checkpoint, "--data", photos)
    fails("finetune", *options, says=(photos, "12 images", "batch of 64"))


@pytest.mark.parametrize("epochs, warmup", [(1, 0), (2, 0), (6, 1), (12, 2), (30, 5), (90, 5)])
def test_a_short_run_has_a_short_warmup(
    started: Started, checkpoint: Path, recipe: Options, epochs: int, warmup: int
):
    found = started("finetune", "--checkpoint", checkpoint, *recipe, "--epochs", epochs)
    assert found["warmup_epochs"] == warmup


def test_a_warmup_as_long_as_the_run(fails: Run, checkpoint: Path, recipe: Options):
    options = ("--checkpoint", checkpoint, *recipe, "--warmup", 2)
    fails("finetune", *options, says=("--warmup 2", "2 --epochs"))


def test_the_source_is_the_checkpoints(started: Started, checkpoint: Path, recipe: Options):
    assert started("finetune", "--checkpoint", checkpoint, *recipe)["source"] == 4
    again = started("finetune", "--checkpoint", checkpoint, *recipe, "--source", 0)
    assert again["source"] == 0


def test_zero_is_given(started: Started, checkpoint: Path, recipe: Options):
    """And not taken for an option that isn't there."""
    flags = ("weight-decay", "mixup", "cutmix", "erasing", "drop-path", "label-smoothing")
    zeros = [text for name in flags for text in (f"--{name}", 0)]
    found = started("finetune", "--checkpoint", checkpoint, *recipe, *zeros)
    assert {name: found[name.replace("weight-decay", "weight_decay")] for name in flags} == (
        dict.fromkeys(flags, 0)
    )


def test_adapters_alone(
    succeeds: Run, checkpoint: Path, bank_file: Path, recipe: Options, here: Path
):
    """``build`` takes the branches without a word, and the engines say what PyTorch says."""
    options = ("--checkpoint", checkpoint, *recipe, "--tune", "adaptformer", "--lr", 0.05)
    succeeds("finetune", *options, "--adapter-width", 3, "--adapter-scale", 10)
    file = here / "finetuned.safetensors"
    info = Checkpoint.open(file).info
    assert (info.spec.adapter_width, info.spec.classes, info.source) == (3, 2, 4)
    before, after = load_file(checkpoint), load_file(file)
    assert {n for n, t in before.items() if not np.array_equal(after[n], t)} == {
        "head.weight", "head.bias"
    }  # fmt: skip
    ups = [after[f"blocks.{layer}.mlp.adapter_up.weight"] for layer in range(4)]
    assert all(np.abs(up).max() > 0.1 for up in ups)  # trained, and scaled by 10

    succeeds("build", "--checkpoint", file, "--bank", bank_file)
    document = json.loads(succeeds("verify", "tiny-source4", "--json").stdout)
    assert document["passed"] is True
    assert Bundle.open(here / "tiny-source4").spec.adapter_width == 3


def test_adapters_of_another_width(succeeds: Run, fails: Run, checkpoint: Path, recipe: Options):
    tune = (*recipe, "--epochs", 1, "--tune", "adaptformer")
    succeeds("finetune", "--checkpoint", checkpoint, *tune, "--adapter-width", 3)
    again = ("--checkpoint", "finetuned.safetensors", *tune, "--out", "more.safetensors")
    fails("finetune", *again, says=("--adapter-width 32", "--adapter-width 3"))
    succeeds("finetune", *again, "--adapter-width", 3)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("size", [32, 48])
def test_another_image_size(
    succeeds: Run, checkpoint: Path, recipe: Options, scratch: Options, here: Path, photos: Path,
    random: bool, size: int,
):  # fmt: skip
    start = scratch if random else ("finetune", "--checkpoint", checkpoint, *recipe)
    succeeds(*start, "--epochs", 1, "--image-size", size)
    file = here / "finetuned.safetensors"
    assert Checkpoint.open(file).info.spec.image_size == (size, size)
    assert load_file(file)["pos_embed"].shape == (1, (size // 8) ** 2 + 1, 64)
    options = ("--checkpoint", file, "--bank", "none", "--targets", "4", "--out", "bundle")
    succeeds("build", *options)
    succeeds("run", "bundle", "--variant", 4, photos / "a" / "0.png")


def test_positions_are_resampled(
    succeeds: Run, checkpoint: Path, recipe: Options, here: Path, spec: VitSpec
):
    options = ("finetune", "--checkpoint", checkpoint, *recipe, "--lr", 1e-12, "--image-size", 48)
    assert "positions are resampled from 4×4 to 6×6 patches" in succeeds(*options).stderr
    found = load_file(here / "finetuned.safetensors")["pos_embed"]
    wanted = resize_positions(spec, load_file(checkpoint), (48, 48))[1]["pos_embed"]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("random", [False, True])
def test_an_image_size_that_patches_do_not_fill(
    fails: Run, checkpoint: Path, recipe: Options, scratch: Options, random: bool
):
    start = scratch if random else ("finetune", "--checkpoint", checkpoint, *recipe)
    fails(*start, "--image-size", 45, says=("--image-size 45×45", "8×8", "48×48 would do"))


@pytest.mark.parametrize("flag, expected", [("--proportional", True), ("--no-proportional", False)])
def test_proportional_attention_is_written_down(
    succeeds: Run, checkpoint: Path, recipe: Options, here: Path, flag: str, expected: bool
):
    succeeds("finetune", "--checkpoint", checkpoint, *recipe, "--epochs", 1, flag)
    method = Method("tome", expected)
    assert Checkpoint.open(here / "finetuned.safetensors").info.method == method
    succeeds("finetune", "--checkpoint", "finetuned.safetensors", *recipe, "--out", "2.safetensors")
    assert Checkpoint.open(here / "2.safetensors").info.method == method


def test_from_scratch(succeeds: Run, scratch: Options, here: Path):
    options = (*scratch, "--method", "evit", "--out", "new.safetensors")
    succeeds(*options, "--warmup", 1, "--clip", 1, "--label-smoothing", 0.2)
    info = Checkpoint.open(here / "new.safetensors").info
    assert (info.spec.model, info.spec.classes, info.source) == ("tiny", 2, 0)
    assert info.method.name == "evit"


def test_the_seed_decides(succeeds: Run, scratch: Options, here: Path):
    for out, seed in (("one", 1), ("same", 1), ("other", 2)):
        succeeds(*scratch, "--out", f"{out}.safetensors", "--seed", seed)
    one, same, other = (
        (here / f"{name}.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same != other


def test_a_stopped_run_is_continued(
    run: Run, succeeds: Run, checkpoint: Path, recipe: Options, here: Path, stops: Callable
):
    options = ("finetune", "--checkpoint", checkpoint, *recipe, "--source", 4)
    succeeds(*options, "--out", "whole.safetensors")
    with stops(1):
        assert run(*options, "--out", "broken.safetensors").exit_code == 130
    assert not (here / "broken.safetensors").exists()

    result = succeeds(*options, "--out", "broken.safetensors")
    assert len([line for line in result.stderr.splitlines() if " loss " in line]) == 3
    broken, whole = (here / f"{name}.safetensors" for name in ("broken", "whole"))
    assert broken.read_bytes() == whole.read_bytes()
    assert not list(here.glob("*.state"))


@pytest.mark.parametrize(
    "options, difference",
    [
        (("--source", 8), "source 4 there, 8 here"),
        (("--label-smoothing", 0.5), "label-smoothing 0.1 there, 0.5 here"),
        (("--image-size", 48, "--quiet"), "image-size [32, 32] there, [48, 48] here"),
        (("--tune", "adaptformer", "--lr", 1.875e-5), "adapter-scale null there, 0.1 here"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_state_of_another_recipe(
    run: Run, fails: Run, checkpoint: Path, recipe: Options, stops: Callable, options: Options,
    difference: str,
):  # fmt: skip
    command = ("finetune", "--checkpoint", checkpoint, *recipe)
    with stops(1):
        assert run(*command).exit_code == 130
    fails(*command, *options, says=("finetuned.safetensors.state", "another recipe", difference))


def test_a_checkpoint_with_a_random_start(fails: Run, checkpoint: Path, recipe: Options):
    options = ("--init", "random", "--checkpoint", checkpoint, *recipe)
    fails("finetune", *options, says=("--checkpoint", "--init random"))


def test_adapters_on_a_random_start(fails: Run, scratch: Options):
    fails(*scratch, "--tune", "adaptformer", says=("--tune adaptformer", "--init random"))


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
    fails("finetune", *options, says=("val", "its class 'a' is empty"))


def test_validation_images_of_other_classes(
    fails: Run, checkpoint: Path, recipe: Options, photos: Path, image_folder: Callable
):
    image_folder(Path("val"), ("a", "c"), each=1)
    options = ("--checkpoint", checkpoint, *recipe, "--val", "val")
    fails("finetune", *options, says=("--val val", f"--data {photos}", "same names"))


def test_images_that_cannot_be_read(
    succeeds: Run, checkpoint: Path, recipe: Options, photos: Path, image_folder: Callable
):
    val = image_folder(Path("val"), each=2)
    for broken in (photos / "a" / "1.png", val / "b" / "1.png"):
        broken.write_bytes(b"not an image")
    options = ("--checkpoint", checkpoint, *recipe, "--val", val)
    result = succeeds("finetune", *options, "--json")
    document = json.loads(result.stdout)
    assert document["unreadable_images"] == 1
    assert set(document["accuracy_after_epoch"].values()) <= {0, 100 / 3, 200 / 3, 100}
    for broken in (photos / "a" / "1.png", val / "b" / "1.png"):
        assert result.stderr.count(f"{broken}: can't be read; skipped") == 1


def test_a_folder_that_cannot_be_written(
    fails: Run, checkpoint: Path, recipe: Options, tmp_path: Path
):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out.safetensors"
    says = (tmp_path / "file", "can't be written")
    fails("finetune", "--checkpoint", checkpoint, *recipe, "--out", out, says=says)


def test_without_torch(fails: Run, photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tocom_export.cli.training_options.is_installed", lambda *_: False)
    fails("finetune", "--data", photos, says=("torch", "pip install 'tocom-export[torch]'"))

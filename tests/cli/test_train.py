from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file

from tocom_export.cli.output import Output
from tocom_export.cli.training_options import report_steps
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.compression.method import Method
from tocom_export.model.spec import VitSpec
from tocom_export.training.loop.optimizer import Hyperparameters

Run = Callable[..., Result]
Started = Callable[..., dict[str, Any]]
Options = tuple[object, ...]


@pytest.fixture
def headless(tmp_path: Path, make_spec: Callable, make_checkpoint: Callable) -> Path:
    """A checkpoint without a head, as MAE's are."""
    spec = make_spec(model="tiny", image_size=[32, 32], classes=0)
    return make_checkpoint(tmp_path, spec, metadata=to_metadata(ModelInfo(spec)))


@pytest.fixture
def unproportional(tmp_path: Path, spec: VitSpec, make_checkpoint: Callable) -> Path:
    info = ModelInfo(spec, 0, Method("tome", proportional=False))
    return make_checkpoint(tmp_path, spec, metadata=to_metadata(info))


def test_a_bank_that_build_takes(
    succeeds: Run, checkpoint: Path, recipe: Options, here: Path, written: Callable
):
    options = ("--checkpoint", checkpoint, *recipe, "--rank", 3, "--out", "bank.safetensors")
    result = succeeds("train", *options, "--json")
    assert json.loads(result.stdout) == {
        "bank": "bank.safetensors",
        "model": "tiny",
        "parameters": 4 * 2 * 16 * 2 * 64 * 3,
        "backbone_parameters": sum(t.size for t in load_file(checkpoint).values()),
        "unreadable_images": 0,
    }
    assert "step 6/6 loss" in result.stderr
    bank = ToComBank.load(here / "bank.safetensors")
    assert (bank.model, bank.method.name, bank.rank) == ("tiny", "tome", 3)
    assert (bank.arithmetic, bank.groups) == ("steps", 16)
    assert bank.q_up.any()
    assert written() == ["bank.safetensors", "bank.safetensors.csv"]
    model = ("--checkpoint", checkpoint, "--bank", "bank.safetensors")
    succeeds("build", *model, "--targets", "8", "--no-verify")


def test_the_closing_words(succeeds: Run, checkpoint: Path, recipe: Options):
    result = succeeds("train", "--checkpoint", checkpoint, *recipe)
    share = 100 * 32768 / sum(t.size for t in load_file(checkpoint).values())
    assert result.stdout == ""
    told = f"Wrote bank.safetensors: 32,768 parameters for tiny, {share:.2f} % of its own."
    assert result.stderr.splitlines()[-2:] == [told, "What it gives, --val DATA would measure."]


def test_what_a_bank_gives(
    succeeds: Run, checkpoint: Path, recipe: Options, labelled: Callable[..., Path]
):
    val = labelled("val", [n % 10 for n in range(48)])
    options = ("train", "--checkpoint", checkpoint, *recipe, "--lr", 0.01, "--val", val)
    result = succeeds(*options, "--out", "one.safetensors")
    title, heads, *rows = result.stdout.splitlines()
    assert title == f"{val}, 48 images; KL from the teacher, nats"
    for head in ("degrees", "divergence with bank", "top-1 of teacher", "top-1 with bank"):
        assert head in heads
    assert [row[:6].strip() for row in rows] == ["0 → 8", "0 → 16", "16 → 0"]
    assert "Wrote one.safetensors" in result.stderr
    assert "would measure" not in result.stderr

    found = json.loads(succeeds(*options, "--out", "two.safetensors", "--json").stdout)["val"]
    assert (found["images"], found["measure"], found["untrained"]) == (48, "kl", False)
    for pair, row in zip(found["pairs"], rows, strict=True):
        for told in pair["distance"].values():
            assert f"{told:.4f}" in row
        for told in pair["accuracy"].values():
            assert f"{told:.2f} ±" in row


def test_a_bank_is_the_same_with_and_without_a_look_at_it(
    succeeds: Run, checkpoint: Path, recipe: Options, labelled: Callable[..., Path]
):
    val = labelled("val", [n % 10 for n in range(48)])
    options = ("train", "--checkpoint", checkpoint, *recipe)
    succeeds(*options, "--out", "one.safetensors", "--val", val)
    succeeds(*options, "--out", "two.safetensors")
    one, two = (Path(f"{name}.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_bank_is_there_when_the_look_at_it_is_stopped(
    run: Run, checkpoint: Path, recipe: Options, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tocom_export.training.bank_report.report_bank", stop)
    result = run("train", "--checkpoint", checkpoint, *recipe, "--val", photos)
    assert result.exit_code == 130
    *_, wrote, stopped = filter(None, result.stderr.splitlines())
    assert wrote.startswith("Wrote bank.safetensors: ")
    assert stopped == "Stopped."
    assert ToComBank.load(Path("bank.safetensors")).model == "tiny"


def test_a_bank_that_gives_nothing_is_told(
    succeeds: Run, checkpoint: Path, recipe: Options, photos: Path
):
    """And labels of other classes are no labels."""
    options = ("--checkpoint", checkpoint, *recipe, "--val", photos)
    result = succeeds("train", *options, "--lr", "1e-12")
    assert "top-1" not in result.stdout
    assert f"--val {photos} has 2 classes, but {checkpoint} has a head of 10." in result.stderr
    assert "Accuracy is left out." in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == (
        "The bank lowers the divergence by no more than 1 % at 0 → 8, 0 → 16, 16 → 0. Train it "
        "for more --epochs, or with a higher --lr."
    )


def test_what_a_bank_gives_a_model_without_a_head(
    succeeds: Run, headless: Path, recipe: Options, photos: Path
):
    options = ("--checkpoint", headless, *recipe, "--val", photos)
    result = succeeds("train", *options, "--lr", 0.01)
    assert "features' L1 distance from the teacher" in result.stdout
    assert "distance with bank" in result.stdout
    assert "Accuracy" not in result.stderr


def test_images_to_measure_on_that_are_not_there(
    fails: Run, checkpoint: Path, recipe: Options, written: Callable
):
    """That is known before the first step."""
    options = ("--checkpoint", checkpoint, *recipe, "--val", "none")
    fails("train", *options, says=("none: no such folder",))
    assert written() == []


def test_the_defaults_are_the_papers(started: Started, checkpoint: Path, photos: Path):
    found = started("train", "--checkpoint", checkpoint, "--data", photos, "--batch", 8)
    expected = {
        "epochs": 10, "batch": 8, "lr": 2e-3 * 8 / 1024, "weight_decay": 0.05, "warmup_epochs": 0,
        "clip": None, "seed": 0, "augment": "rand-m9-mstd0.5-inc1", "flip": True, "mixup": 0.8,
        "cutmix": 1.0, "erasing": 0.25, "crop-scale": 0.08, "drop-path": pytest.approx(0.1),
        "loss": "kl", "arithmetic": "steps", "scale": 0.1, "method": "tome", "accumulate": 1,
        "amp": None,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_the_default_batch(fails: Run, checkpoint: Path, photos: Path):
    options = ("--checkpoint", checkpoint, "--data", photos)
    fails("train", *options, says=(photos, "12 images", "batch of 1024", "--batch"))


def test_options_reach_the_loop(started: Started, checkpoint: Path, recipe: Options):
    given = {
        "epochs": 3, "batch": 6, "lr": 0.5, "weight-decay": 0.25, "warmup": 2, "clip": 4.0,
        "seed": 9, "augment": "crop", "mixup": 0.5, "cutmix": 0.75, "erasing": 0.125,
        "crop-scale": 0.5, "drop-path": 0.25, "scale": 2.0, "accumulate": 3,
    }  # fmt: skip
    flags = [text for name, value in given.items() for text in (f"--{name}", value)]
    found = started("train", "--checkpoint", checkpoint, *recipe, *flags, "--no-flip")
    names = {"weight-decay": "weight_decay", "warmup": "warmup_epochs"}
    assert {name: found[names.get(name, name)] for name in given} == given
    assert found["flip"] is False


@pytest.mark.parametrize("augment", ["crop", "none", "rand-m5-n1"])
def test_augmentations(succeeds: Run, checkpoint: Path, recipe: Options, augment: str):
    options = ("--checkpoint", checkpoint, *recipe, "--augment", augment, "--epochs", 1)
    succeeds("train", *options)


def test_an_augmentation_that_is_none(fails: Run, checkpoint: Path, recipe: Options):
    options = ("--checkpoint", checkpoint, *recipe, "--augment", "nonsense")
    fails("train", *options, says=("--augment", "nonsense", "crop or none"))


def test_a_bank_for_pruning(succeeds: Run, checkpoint: Path, recipe: Options, here: Path):
    succeeds("train", "--checkpoint", checkpoint, *recipe, "--method", "evit")
    assert ToComBank.load(here / "bank.safetensors").method.name == "evit"


@pytest.mark.parametrize(
    "options, expected", [((), False), (("--proportional",), True), (("--no-proportional",), False)]
)
def test_proportional_attention_follows_the_option_then_the_checkpoint(
    succeeds: Run, unproportional: Path, recipe: Options, here: Path, options: Options,
    expected: bool,
):  # fmt: skip
    succeeds("train", "--checkpoint", unproportional, *recipe, "--epochs", 1, *options)
    assert ToComBank.load(here / "bank.safetensors").method == Method("tome", expected)


@pytest.mark.parametrize("arithmetic, groups, rank", [("shared", 1, 48), ("no-inversion", 32, 3)])
def test_arithmetic_of_the_ablation(
    succeeds: Run, checkpoint: Path, recipe: Options, here: Path, arithmetic: str, groups: int,
    rank: int,
):  # fmt: skip
    options = ("--checkpoint", checkpoint, *recipe, "--rank", 3, "--arithmetic", arithmetic)
    document = json.loads(succeeds("train", *options, "--json").stdout)
    bank = ToComBank.load(here / "bank.safetensors")
    assert (bank.arithmetic, bank.groups, bank.rank) == (arithmetic, groups, rank)
    assert document["parameters"] == 4 * 2 * 2 * 64 * groups * rank
    model = ("--checkpoint", checkpoint, "--bank", "bank.safetensors")
    succeeds("build", *model, "--targets", "2,8")  # verified against PyTorch, up and down


def test_the_losses_differ(
    succeeds: Run, checkpoint: Path, tmp_path: Path, here: Path, image_folder: Callable,
    info: ModelInfo,
):  # fmt: skip
    data = image_folder(tmp_path / "ten", info.classes, each=1)
    options = ("--data", data, "--epochs", 2, "--batch", 4, "--workers", 0, "--lr", 0.01)
    for loss in ("default", "kl", "features", "classes"):
        chosen = () if loss == "default" else ("--loss", loss)
        out = ("--out", f"{loss}.safetensors")
        succeeds("train", "--checkpoint", checkpoint, *options, *chosen, *out)
    banks = {file.stem: file.read_bytes() for file in here.glob("*.safetensors")}
    assert len(banks) == 4
    assert banks["default"] == banks["kl"]
    assert len(set(banks.values())) == 3


def test_labels_that_the_head_has_not(fails: Run, checkpoint: Path, recipe: Options):
    options = ("--checkpoint", checkpoint, *recipe, "--loss", "classes")
    fails("train", *options, says=("--loss classes", "2 classes", "10"))


@pytest.mark.parametrize("loss", [(), ("--loss", "features")])
def test_a_model_without_a_head_learns_from_features(
    started: Started, headless: Path, recipe: Options, loss: Options
):
    found = started("train", "--checkpoint", headless, *recipe, *loss)
    assert found["loss"] == "features"


def test_a_bank_of_a_model_without_a_head(
    succeeds: Run, headless: Path, recipe: Options, here: Path
):
    succeeds("train", "--checkpoint", headless, *recipe, "--lr", 0.01)
    assert np.abs(ToComBank.load(here / "bank.safetensors").v_up).max() > 1e-4


@pytest.mark.parametrize("loss", ["kl", "classes"])
def test_a_loss_that_needs_a_head(fails: Run, headless: Path, recipe: Options, loss: str):
    options = ("--checkpoint", headless, *recipe, "--loss", loss)
    fails("train", *options, says=(f"--loss {loss}", "no head", "--loss features"))


@pytest.mark.parametrize("stopped_in", [0, 1])
def test_a_stopped_run_is_continued(
    run: Run, succeeds: Run, checkpoint: Path, recipe: Options, here: Path, stops: Callable,
    stopped_in: int,
):  # fmt: skip
    options = ("train", "--checkpoint", checkpoint, *recipe)
    succeeds(*options, "--out", "whole.safetensors")
    with stops(stopped_in):
        result = run(*options, "--out", "broken.safetensors")
    assert result.exit_code == 130
    assert "Run the same command again" in result.stderr
    assert result.stderr.endswith("Stopped.\n")
    assert not (here / "broken.safetensors").exists()

    result = succeeds(*options, "--out", "broken.safetensors")
    steps = [line for line in result.stderr.splitlines() if " loss " in line]
    assert len(steps) == 6 - 3 * stopped_in
    assert ("continues after step 3 of 6" in result.stderr) is bool(stopped_in)
    broken, whole = (here / f"{name}.safetensors" for name in ("broken", "whole"))
    assert broken.read_bytes() == whole.read_bytes()
    assert not list(here.glob("*.state"))


@pytest.mark.parametrize(
    "options, difference",
    [
        (("--lr", "0.5"), "lr 7.8125e-06 there, 0.5 here"),
        (("--augment", "none"), 'augment "rand-m9-mstd0.5-inc1" there, "none" here'),
        (("--loss", "features"), 'loss "kl" there, "features" here'),
        (("--mixup", "0", "--no-flip"), "flip true there, false here; mixup 0.8 there, 0.0 here"),
        (("--method", "evit"), 'method "tome" there, "evit" here'),
        (("--epochs", "3"), "epochs 2 there, 3 here"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_state_of_another_recipe(
    run: Run, fails: Run, checkpoint: Path, recipe: Options, stops: Callable, options: Options,
    difference: str,
):  # fmt: skip
    command = ("train", "--checkpoint", checkpoint, *recipe)
    with stops(1):
        assert run(*command).exit_code == 130
    fails(*command, *options, says=("bank.safetensors.state", "another recipe", difference))


def test_a_part_of_a_batch_at_a_time_goes_on_with_the_same_run(
    run: Run, succeeds: Run, checkpoint: Path, recipe: Options, stops: Callable
):
    """How a run that is out of memory is to be mended."""
    command = ("train", "--checkpoint", checkpoint, *recipe)
    with stops(1):
        assert run(*command).exit_code == 130
    assert "continues after step 3" in succeeds(*command, "--accumulate", 2).stderr


def test_parts_that_a_batch_has_not(fails: Run, checkpoint: Path, recipe: Options):
    options = ("--checkpoint", checkpoint, *recipe, "--accumulate", 3)
    fails("train", *options, says=("--batch 4", "--accumulate 3", "multiple"))


@pytest.mark.parametrize("batch, parts", [(3, 1), (6, 2)])
def test_an_odd_number_of_images_to_mix(
    fails: Run, succeeds: Run, checkpoint: Path, recipe: Options, batch: int, parts: int
):
    options = ("--checkpoint", checkpoint, *recipe, "--batch", batch, "--accumulate", parts)
    fails("train", *options, says=("--mixup", "--cutmix", "3 images", f"--batch {batch}", "even"))
    succeeds("train", *options, "--mixup", 0, "--cutmix", 0, "--force")


@pytest.mark.parametrize("warmup", [2, 3])
def test_a_warmup_as_long_as_the_run(fails: Run, checkpoint: Path, recipe: Options, warmup: int):
    options = ("--checkpoint", checkpoint, *recipe, "--warmup", warmup)
    fails("train", *options, says=(f"--warmup {warmup}", "2 --epochs"))


@pytest.mark.parametrize(
    "options, says",
    [
        (("--device", "nonsense"), ("--device nonsense", "cuda:N")),
        (("--device", "mps"), ("--device mps", "cuda:N")),
        (("--device", "cpu", "--amp", "fp16"), ("--amp fp16", "CUDA", "bf16")),
        (("--amp", "fp8"), ("--amp", "fp8", "bf16")),
    ],
    ids=str,
)
def test_a_place_that_cannot_compute(
    fails: Run, checkpoint: Path, recipe: Options, options: Options, says: Options,
    written: Callable,
):  # fmt: skip
    fails("train", "--checkpoint", checkpoint, *recipe, *options, says=says)
    assert written() == []


def test_a_loss_that_is_not_finite(fails: Run, checkpoint: Path, recipe: Options, here: Path):
    options = ("--checkpoint", checkpoint, *recipe, "--scale", "1e30", "--lr", "1e30")
    fails("train", *options, "-q", says=("loss nan", "step", "--lr", "--clip"), status=1)
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


def test_images_of_one_class(fails: Run, checkpoint: Path, tmp_path: Path, image_folder: Callable):
    data = image_folder(tmp_path / "images", ("a",))
    options = ("--checkpoint", checkpoint, "--data", data, "--loss", "classes")
    fails("train", *options, says=(data, "one class only ('a')"))


def test_shards_are_the_same_images(
    succeeds: Run, checkpoint: Path, photos: Path, recipe: Options, make_shards: Callable,
    tmp_path: Path, here: Path,
):  # fmt: skip
    files = sorted(photos.glob("*/*.png"))
    labels = [int(file.parent.name == "b") for file in files]
    shards = make_shards(tmp_path / "shards", [f.read_bytes() for f in files], labels, ("a", "b"))
    options = ("train", "--checkpoint", checkpoint, *recipe)
    succeeds(*options, "--out", "folder.safetensors")
    succeeds(*options, "--data", shards, "--out", "shards.safetensors")
    folder, packed = (here / f"{name}.safetensors" for name in ("folder", "shards"))
    assert folder.read_bytes() == packed.read_bytes()


def test_an_image_that_cannot_be_read(
    succeeds: Run, checkpoint: Path, photos: Path, recipe: Options
):
    broken = photos / "b" / "3.png"
    broken.write_bytes(b"not an image")
    result = succeeds("train", "--checkpoint", checkpoint, *recipe, "--json")
    assert json.loads(result.stdout)["unreadable_images"] == 1
    assert result.stderr.count(f"{broken}: can't be read; skipped") == 1


def test_fewer_images_than_a_batch(fails: Run, checkpoint: Path, photos: Path):
    options = ("--checkpoint", checkpoint, "--data", photos, "--batch", 13)
    fails("train", *options, says=(photos, "12 images", "batch of 13"))


def test_no_data(fails: Run, checkpoint: Path):
    fails("train", "--checkpoint", checkpoint, says=("--data",))


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
    fails: Run, checkpoint: Path, recipe: Options, files_end_at: Callable, written: Callable
):
    options = ("--checkpoint", checkpoint, *recipe, "-q")
    with files_end_at(50_000):  # a bank and its optimiser need more
        fails("train", *options, says=("bank.", "can't be written"))
    assert set(written()) <= {"bank.safetensors.csv"}


@pytest.mark.parametrize("name", ["bank.pth", "bank", "bank.state"])
def test_an_output_that_build_would_not_read(
    fails: Run, checkpoint: Path, recipe: Options, here: Path, name: str
):
    options = ("--checkpoint", checkpoint, *recipe, "--out", name)
    fails("train", *options, says=("--out", name, ".safetensors"))
    assert list(here.iterdir()) == []


def test_without_torch(fails: Run, checkpoint: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tocom_export.cli.training_options.is_installed", lambda *_: False)
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


def test_a_finished_result_is_replaced_by_force(
    succeeds: Run, checkpoint: Path, recipe: Options, here: Path
):
    (here / "bank.safetensors").write_bytes(b"a week of training")
    succeeds("train", "--checkpoint", checkpoint, *recipe, "--force")
    assert ToComBank.load(here / "bank.safetensors").model == "tiny"


@pytest.mark.parametrize("epochs, lines", [(1, 50), (10, 100)])
def test_a_line_for_each_hundredth(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, epochs: int, lines: int
):
    """Where stderr is no terminal; a step takes half a second here."""
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("tocom_export.cli.training_options.time", clock)
    total = 50 * epochs
    with report_steps(Output(False, 0), "training", Hyperparameters(epochs, 4, 1e-3), 50) as report:
        for step in range(1, total + 1):
            now += 0.5
            report(step, total, 1 / step, 1e-3)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == lines
    assert told[-1] == (
        f"training step {total}/{total} loss {1 / total:.4f} lr 1.00e-03 8 images/s, 0 min left"
    )
    if epochs == 10:
        assert told[3].endswith("step 20/500 loss 0.0500 lr 1.00e-03 8 images/s, 4 min left")


def test_a_quiet_run_says_nothing(succeeds: Run, checkpoint: Path, recipe: Options):
    result = succeeds("train", "--checkpoint", checkpoint, *recipe, "-q")
    assert result.output == ""

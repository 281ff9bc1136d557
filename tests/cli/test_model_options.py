"""Options that say which weights are meant, what they are of, and how images are prepared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.numpy import load_file

from tocom_export.bundle.opening import Bundle
from tocom_export.cli.model_options import Channels, ImageSize
from tocom_export.compression.method import Method
from tocom_export.model.catalogue import REFERENCE_CHECKPOINT
from tocom_export.model.preprocess import Preprocess

Run = Callable[..., Result]
Options = tuple[object, ...]
NOTE = "the averaged weights are taken, state_dict_ema. --weights-key chooses others: state_dict."


@pytest.mark.parametrize(
    ("text", "size"), [("224", (224, 224)), ("48x160", (48, 160)), ("1x999999", (1, 999999))]
)
def test_an_image_size(text: str, size: tuple[int, int]):
    assert ImageSize().convert(text, None, None) == size
    assert ImageSize().convert(size, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "224x", "x224", "0x8", "-8", "8.5", "8X8", "1x2x3"])
def test_no_image_size(text: str):
    with pytest.raises(click.BadParameter, match="write 224, or 224x448"):
        ImageSize().convert(text, None, None)


def test_numbers_of_channels():
    assert Channels().convert("0.5", None, None) == (0.5,)
    assert Channels().convert("0.1, 0.2,3", None, None) == (0.1, 0.2, 3.0)
    assert Channels().convert((0.1,), None, None) == (0.1,)
    for text in ("", "a", "0.1,", "nan", "0.1;0.2"):
        with pytest.raises(click.BadParameter):
            Channels().convert(text, None, None)


@pytest.fixture
def scripted(here: Path) -> Path:
    """A training script's checkpoint of the model inside the package, averaged weights in it."""
    state = {name: torch.from_numpy(t) for name, t in load_file(REFERENCE_CHECKPOINT).items()}
    plain = {f"_orig_mod.{name}": tensor / 2 for name, tensor in state.items()}
    content = {"epoch": 1, "state_dict": plain, "state_dict_ema": state}
    torch.save(content, here / "model_best.pth.tar")
    return here / "model_best.pth.tar"


def test_build_takes_averaged_weights_and_says_so(succeeds: Run, scripted: Path, here: Path):
    options = ("--checkpoint", scripted, "--targets", 8, "--no-verify")
    told = succeeds("build", *options, "--out", "averaged").stderr
    assert f"{scripted}: {NOTE}" in told
    assert "crop 1 (center), bicubic (the reference model's)." in told
    told = succeeds("build", *options, "--out", "plain", "--weights-key", "state_dict").stderr
    assert NOTE not in told
    averaged, plain = (
        load_file(here / name / "weights.safetensors")["head.weight"]
        for name in ("averaged", "plain")
    )
    np.testing.assert_array_equal(averaged, 2 * plain)


def test_a_dry_run_says_so_too(succeeds: Run, scripted: Path):
    told = succeeds("build", "--checkpoint", scripted, "--dry-run").stderr
    assert NOTE in told
    assert "Image statistics: " in told


def test_refit_takes_averaged_weights_and_says_so(succeeds: Run, scripted: Path, here: Path):
    succeeds("build", "--targets", 8, "--no-verify", "--out", "bundle")
    before = (here / "bundle" / "r08.safetensors").read_bytes()
    refit = ("refit", "bundle", "--checkpoint", scripted, "--no-verify")
    assert NOTE in succeeds(*refit).stderr
    assert (here / "bundle" / "r08.safetensors").read_bytes() == before
    told = succeeds(*refit, "--weights-key", "state_dict").stderr
    assert NOTE not in told
    assert (here / "bundle" / "r08.safetensors").read_bytes() != before


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_training_takes_averaged_weights_and_says_so(
    succeeds: Run, fails: Run, scripted: Path, recipe: Options, command: str
):
    options = (command, "--checkpoint", scripted, *recipe)
    assert NOTE in succeeds(*options).stderr
    assert NOTE not in succeeds(*options, "--weights-key", "state_dict", "--force").stderr
    assert NOTE not in succeeds(*options, "-q", "--force").stderr
    says = ("has no --weights-key model; it has state_dict, state_dict_ema.",)
    fails(*options, "--weights-key", "model", "--force", says=says)


def test_evaluate_takes_averaged_weights_and_says_so(
    succeeds: Run, fails: Run, scripted: Path, bundle: Path, labelled: Callable[..., Path]
):
    classes = [f"class {number:03d}" for number in range(200)]
    data = labelled("shards", [0] * 48, classes)
    options = ("evaluate", scripted, "--data", data, "--targets", 8, "--json")
    assert NOTE in succeeds(*options).stderr
    assert NOTE not in succeeds(*options, "--weights-key", "state_dict").stderr
    says = ("has no --weights-key model",)
    fails(*options, "--weights-key", "model", says=says)
    says = ("--weights-key is for checkpoints; a bundle has its own weights.",)
    fails("evaluate", bundle, "--data", data, "--weights-key", "model", says=says)


def test_inspect_tells_the_entries_of_a_pickle(succeeds: Run, scripted: Path):
    found = json.loads(succeeds("inspect", scripted, "--json").stdout)
    assert (found["kind"], found["entry"], found["other entries"]) == (
        "checkpoint", "state_dict_ema", "state_dict"
    )  # fmt: skip


def test_weights_key_without_a_pickle(fails: Run, checkpoint: Path, recipe: Options):
    fails("build", "--weights-key", "model", says=("--weights-key names an entry of a --checkpo",))
    says = (f"--weights-key model: {checkpoint} has no entries",)
    fails("build", "--checkpoint", checkpoint, "--weights-key", "model", says=says)
    random = ("finetune", "--init", "random", *recipe)
    says = ("--weights-key has no meaning with --init random",)
    fails(*random, "--weights-key", "model", says=says)
    fails(*random, "--pool", "avg", says=("--pool has no meaning with --init random",))


def test_classes_and_statistics(succeeds: Run, model: Options, here: Path):
    (here / "names.txt").write_text("\n".join("abcdefghij"))
    result = succeeds(
        "build", *model, "--targets", 8, "--out", "bundle", "--classes", "names.txt", "--mean", 0.5,
        "--std", "0.1,0.2,0.3", "--crop-pct", 0.9, "--interpolation", "bilinear",
    )  # fmt: skip
    bundle = Bundle.open(here / "bundle")
    assert bundle.classes == tuple("abcdefghij")
    assert bundle.preprocess == Preprocess((0.5,) * 3, (0.1, 0.2, 0.3), 0.9, "bilinear")
    assert (
        "Image statistics: mean 0.5 0.5 0.5, std 0.1 0.2 0.3, crop 0.9 (center), bilinear "
        "(ImageNet's, as nothing says which, but --crop-pct, --interpolation, --mean, --std as "
        "given)."
    ) in result.stderr.splitlines()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--classes", "names.txt"), ("--classes names.txt names 2 classes, but the head has 10",)),
        (("--classes", "none.txt"), ("--classes none.txt: can't be read",)),
        (("--mean", "0.5,0.5"), ("--mean has 2 values, but images have 3 channels",)),
        (("--std", "0"), ("--std: image statistics can't be",)),
        (("--pool", "avg"), ("--pool avg, but", "says it is token; leave --pool out")),
    ],
)  # fmt: skip
def test_what_doesn_t_fit_the_model(
    fails: Run, model: Options, here: Path, options: Any, says: tuple[str, ...]
):
    (here / "names.txt").write_text("a\nb\n")
    fails("build", *model, *options, says=says)


def test_the_form_of_bare_weights(
    succeeds: Run, fails: Run, make_checkpoint: Callable, make_spec: Callable, here: Path
):
    """A listed model of other images, which are no square, without positions for its prefix."""
    from tocom_export.model.catalogue import known_model

    named, _ = known_model("deit3_small_patch16_224")
    spec = make_spec(**{**vars(named), "image_size": [48, 160], "classes": 4})
    file = make_checkpoint(here, spec)
    options = ("--model", "deit3_small_patch16_224", "--checkpoint", file, "--bank", "none")
    build = ("build", *options, "--targets", 8, "--no-verify", "--out", "bundle")
    fails(*build, says=("30 patches, which are no square: --image-size HxW says",))
    says = ("30 patches, which are no square, nor images of 224x224: --image-size HxW says of",)
    fails(*build, "--image-size", 224, says=says)
    succeeds(*build, "--image-size", "48x160")
    assert Bundle.open(here / "bundle").spec == spec


def test_a_model_without_proportional_attention(
    succeeds: Run, checkpoint: Path, here: Path, make_images: Callable
):
    """As MAE's want it, where no bank says so."""
    build = ("build", "--checkpoint", checkpoint, "--bank", "none", "--targets", 8)
    succeeds(*build, "--no-proportional", "--out", "plain")
    succeeds(*build, "--out", "proportional")
    plain, other = (Bundle.open(here / name) for name in ("plain", "proportional"))
    assert (plain.method, other.method) == (Method("tome", False), Method("tome"))
    images = make_images(plain.spec)
    assert not np.allclose(plain.engine(8).run(images), other.engine(8).run(images), atol=1e-3)

"""``--image-size``: positions of weights for another size are resampled, and that is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import load_file, save_file

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.model.catalogue import known_model
from tocom_export.model.resampling import resample_positions
from tocom_export.model.spec import VitSpec

Run = Callable[..., Result]
Options = tuple[object, ...]
TOLD = "accuracy at another size than trained may differ; finetune adapts."
TINY = "deit_tiny_patch16_224"


def test_build_resamples_and_says_so(
    succeeds: Run, model: Options, checkpoint: Path, spec: VitSpec, here: Path
):
    options = ("build", *model, "--targets", "4,8", "--keep", "0.5")
    told = succeeds(*options, "--image-size", "48x64", "--out", "wide").stderr
    assert f"{checkpoint}: positions are resampled from 4×4 to 6×8 patches; {TOLD}" in told
    bundle = Bundle.open(here / "wide", hashes=True)
    assert bundle.spec == replace(spec, image_size=(48, 64))
    wanted = resample_positions(load_file(checkpoint)["pos_embed"], 1, (4, 4), (6, 8))
    stored = load_file(here / "wide" / "weights.safetensors")["pos_embed"]
    np.testing.assert_array_equal(stored, wanted)
    succeeds("verify", "wide")
    told = succeeds(*options, "--image-size", 32, "--out", "same").stderr
    assert "resampled" not in told
    told = succeeds(*options, "--image-size", 48, "--dry-run").stderr
    assert "resampled from 4×4 to 6×6" in told


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("45", "--image-size 45×45: tiny cuts images into patches of 8×8, which must fill them; "
               "48×48 would do"),
        ("8x1", "8×8 would do"),
        ("999992", "--image-size 999992×999992: that is 15,624,750,001 patches"),
    ],
)  # fmt: skip
def test_sizes_that_are_none(fails: Run, model: Options, here: Path, size: str, says: str):
    fails("build", *model, "--image-size", size, "--out", "bundle", says=(says,))
    assert not list(here.iterdir())


def test_the_model_inside_the_package(succeeds: Run, here: Path):
    """What was measured of it was so at its own size."""
    options = ("build", "--targets", 8, "--no-verify")
    told = succeeds(*options, "--image-size", 96, "--out", "wide").stderr
    assert "positions are resampled from 8×8 to 16×16 patches" in told
    succeeds(*options, "--out", "own")
    accuracy = {name: Bundle.open(here / name).accuracy for name in ("wide", "own")}
    assert (accuracy["wide"], len(accuracy["own"])) == ({}, 1)


@pytest.fixture
def other(here: Path, spec: VitSpec, make_weights: Callable[..., Any]) -> Path:
    """Other weights of the model at its own size, which say what they are."""
    save_file(make_weights(spec, 5), here / "other.safetensors", to_metadata(ModelInfo(spec)))
    return here / "other.safetensors"


def test_refit_resamples_likewise(
    succeeds: Run, fails: Run, checkpoint: Path, other: Path, bundle: Path, here: Path
):
    build = ("build", "--bank", "none", "--targets", "0,8", "--image-size", 48, "--source", 0)
    succeeds("build", *build[1:-2], "--checkpoint", checkpoint, "--source", 4, "--out", "bundle")
    succeeds(*build, "--checkpoint", other, "--out", "wanted")
    told = succeeds("refit", "bundle", "--checkpoint", other, "--source", 0).stderr
    assert f"{other}: positions are resampled from 4×4 to 6×6 patches; {TOLD}" in told
    stored = [load_file(here / name / "weights.safetensors") for name in ("bundle", "wanted")]
    assert all(np.array_equal(stored[0][name], stored[1][name]) for name in stored[1])
    succeeds("verify", "bundle")
    # Weights of the bundle's own size are taken as they are.
    told = succeeds("refit", "bundle", "--checkpoint", "wanted/weights.safetensors").stderr
    assert "resampled" not in told
    # Of another model, they are refused as ever.
    says = ("has 7 classes, the bundle 10",)
    seven = {**load_file(other), "head.weight": np.ones((7, 64), np.float32)}
    save_file({**seven, "head.bias": np.ones(7, np.float32)}, "seven.safetensors")
    fails("refit", "bundle", "--checkpoint", "seven.safetensors", says=says)


def test_refit_with_bare_weights(
    succeeds: Run, fails: Run, make_spec: Callable[..., VitSpec], make_weights: Callable[..., Any]
):
    """By the named model's own size, as in ``build``; another square; or the bundle's own."""
    tiny = make_spec(**{**vars(known_model(TINY)[0]), "classes": 3})
    sizes = {"own": (224, 224), "square": (64, 64), "wide": (48, 96), "odd": (16, 112)}
    for seed, (name, size) in enumerate(sizes.items()):
        weights = make_weights(replace(tiny, image_size=size), seed)
        save_file(weights, f"{name}.safetensors")
    build = ("build", "--model", TINY, "--bank", "none", "--targets", 0, "--no-verify")
    told = succeeds(
        *build, "--checkpoint", "own.safetensors", "--image-size", "48x96", "--out", "b"
    ).stderr
    assert "own.safetensors: positions are resampled from 14×14 to 3×6 patches" in told
    refit = ("refit", "b", "--no-verify", "--checkpoint")
    told = succeeds(*refit, "square.safetensors").stderr
    assert "square.safetensors: positions are resampled from 4×4 to 3×6 patches" in told
    assert "resampled" not in succeeds(*refit, "wide.safetensors").stderr
    says = ("odd.safetensors: pos_embed has shape (1, 8, 192)", "needs (1, 19, 192)")
    fails(*refit, "odd.safetensors", says=says)
    says = ("positions for 7 patches, which are no square, nor images of 48x96: --image-size HxW",)
    odd = ("--checkpoint", "odd.safetensors", "--out", "odd")
    fails(*build, *odd, "--image-size", "48x96", says=says)
    # In two steps: at its own size first.
    succeeds(*build, *odd, "--image-size", "16x112")
    again = ("--checkpoint", "odd/weights.safetensors", "--bank", "none", "--targets", 0)
    told = succeeds(
        "build", *again, "--no-verify", "--image-size", "48x96", "--out", "b", "--force"
    ).stderr
    assert "positions are resampled from 1×7 to 3×6 patches" in told


def test_training_takes_it_too(succeeds: Run, checkpoint: Path, recipe: Options):
    """A bank for images of another size is trained at that."""
    options = ("train", "--checkpoint", checkpoint, *recipe, "--image-size", 48)
    assert "positions are resampled from 4×4 to 6×6 patches" in succeeds(*options).stderr

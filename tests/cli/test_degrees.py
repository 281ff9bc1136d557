"""Degrees beyond what a bank spans, and schedules that keep a share of the patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle

Run = Callable[..., Result]
Options = tuple[object, ...]
LONG = ("--image-size", 96)
"""145 tokens of the small model."""


@pytest.fixture
def long(succeeds: Run, checkpoint: Path, here: Path) -> Path:
    """A bundle of long sequences, without a bank."""
    options = ("--checkpoint", checkpoint, "--bank", "none", *LONG)
    succeeds("build", *options, "--targets", "0,16,23,100", "--out", "long")
    return here / "long"


def test_degrees_beyond_16_without_a_bank(succeeds: Run, long: Path, photos: Path):
    bundle = Bundle.open(long, hashes=True)
    assert list(bundle.variants) == ["r00", "r16", "r23", "r100"]
    assert bundle.variant(23).degrees == (23,) * 4
    assert bundle.variant("100").schedule(bundle.spec).tokens_out == (73, 37, 19, 10)
    assert {v.targets for v in (bundle.variant(23), bundle.variant(100))} == {(16.0,) * 4}
    succeeds("verify", long)
    image = photos / "a" / "0.png"
    for name in ("23", "r23", "100"):
        found = json.loads(succeeds("run", long, "--variant", name, image, "--json").stdout)
        assert found["images"][0]["variant"] == f"r{int(name.strip('r')):02d}"
    assert "r100" in succeeds("inspect", long).stdout
    options = ("--variants", "23,100", "--batch", 1, "--seconds", 0.1, "--json")
    rows = json.loads(succeeds("bench", long, *options).stdout)["rows"]
    assert {row["variant"] for row in rows} == {"r23", "r100"}


def test_degrees_beyond_16_with_a_bank(fails: Run, succeeds: Run, model: Options, here: Path):
    says = (
        "degree 23: a bank compensates degrees 0..16; go without one (--bank none), or list it for "
        "each layer (--schedule NAME=23,23,…), which is compensated as for 16.",
    )
    fails("build", *model, "--targets", "8,23", says=says)
    assert not list(here.iterdir())
    succeeds("build", *model, *LONG, "--targets", 16, "--schedule", "r23=23,23,23,23", "--out", "b")
    made = Bundle.open(here / "b").variants
    assert made["r23"].targets == made["r16"].targets == (16,) * 4
    assert made["r23"].compensated


def test_refit_and_banks(succeeds: Run, long: Path, model: Options, bank_file: Path, here: Path):
    """What was built with a bank may get another; what wasn't gets it as schedules do."""
    succeeds("refit", long, "--source", 4)
    succeeds("refit", long, "--bank", bank_file)
    found = Bundle.open(long, hashes=True).variant("r23")
    assert (found.compensated, set(found.targets)) == (True, {16.0})
    succeeds("build", *model, *LONG, "--targets", 8, "--schedule", "r23=23,23,23,23", "--out", "b")
    succeeds("refit", "b", "--bank", bank_file, "--scale", 0.05)
    assert Bundle.open(here / "b").variant(23).scale == 0.05


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("1000001", "'1000001' is outside the degrees 0..1000000"),
        ("0-99999", "more than 10,000 numbers"),
    ],
)
def test_degrees_that_are_none(fails: Run, model: Options, targets: str, says: str):
    fails("build", *model, "--targets", targets, says=(says,))


def test_sources_stay_what_a_bank_spans(run: Run, model: Options):
    found = run("build", *model, "--source", 17)
    assert found.exit_code == 2
    assert "17 is not in the range 0<=x<=16" in found.stderr


def test_evaluate(
    succeeds: Run, fails: Run, checkpoint: Path, bank_file: Path, labelled: Callable[..., Path]
):
    data = labelled("shards", [0] * 48)
    options = ("evaluate", checkpoint, "--data", data, "--targets", "8,23")
    found = json.loads(
        succeeds(*options, "--schedule", "half=keep:0.5", "--bank", "none", "--json").stdout
    )
    assert [row["variant"] for row in found["rows"]] == ["r08", "r23", "half"]
    for _ in range(2):  # the second adds to what the first wrote
        succeeds(*options, "--bank", "none", "--out", "results")
    assert "r23" in Path("results/results.json").read_text()
    says = ("degree 23: a bank compensates degrees 0..16; go without one (--bank none)",)
    fails(*options, "--bank", bank_file, says=says)


def test_a_share_of_the_patches(succeeds: Run, fails: Run, model: Options, here: Path):
    options = ("build", *model, *LONG, "--targets", 8)
    shares = ("--keep", "0.5,.25", "--keep", "0.7", "--schedule", "half=keep:0.5")
    told = succeeds(*options, *shares, "--dry-run").stderr
    assert "keep50 would remove 23,19,16,14 tokens, layer by layer." in told
    succeeds(*options, *shares, "--out", "b")
    bundle = Bundle.open(here / "b")
    assert list(bundle.variants) == ["r08", "half", "keep50", "keep25", "keep70"]
    left = {n: v.schedule(bundle.spec).tokens_out[-1] - 1 for n, v in bundle.variants.items()}
    assert (left["half"], left["keep50"], left["keep25"], left["keep70"]) == (72, 72, 36, 101)
    assert bundle.variant("half").targets == bundle.variant("keep50").targets
    assert bundle.variant("half").compensated
    twice = ("--keep", 0.5, "--schedule", "keep50=keep:0.4")
    fails(*options, *twice, says=("keep50 is given twice",))


@pytest.mark.parametrize("share", ["0", "1", "50", "1.5", "x", "", "0.5,", "-0.5", "nan"])
def test_shares_that_are_none(run: Run, model: Options, share: str):
    found = run("build", *model, "--keep", share)
    assert found.exit_code == 2
    assert f"{share!r} is no share of the patches; write 0.5, or 0.5,0.7" in found.stderr


def test_a_share_out_of_reach(fails: Run, model: Options, here: Path):
    says = ("--schedule keep1: keep:0.01: at most half of the patches go in a layer",
            "choose keep:0.0625")  # fmt: skip
    fails("build", *model, *LONG, "--keep", 0.01, says=says)
    assert not list(here.iterdir())

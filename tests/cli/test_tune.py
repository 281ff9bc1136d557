from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.schedule import Schedule
from tocom_export.engines.tuning.objective import Objective
from tocom_export.engines.tuning.tune import Tuner

Run = Callable[..., Result]


@pytest.fixture
def pictures(tmp_path: Path, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path / "pictures", each=20)


@pytest.fixture
def options(bundle: Path, pictures: Path, bank_file: Path) -> tuple[object, ...]:
    return (
        "tune",
        bundle,
        "--images",
        pictures,
        "--bank",
        bank_file,
        "--trials",
        12,
        "--threads",
        1,
    )


def test_a_share_of_the_multiply_adds(succeeds: Run, options, bundle: Path, here: Path):
    found = json.loads(succeeds(*options, "--macs", 0.75, "--plot", "p.png", "--json").stdout)
    (one,) = found["variants"]
    opened = Bundle.open(bundle, hashes=True)
    spec, variant = opened.spec, opened.variant("macs75")
    assert one["degrees"] == list(variant.degrees)
    assert (
        one["macs"] == variant.schedule(spec).macs(spec) <= 0.75 * Schedule.of(spec, 0).macs(spec)
    )
    assert one["constant"]["macs"] <= 0.75 * Schedule.of(spec, 0).macs(spec)
    assert one["divergence"] >= 0
    assert 1 <= one["tried"] <= 12
    assert (variant.source, variant.compensated) == (4, True)
    assert (here / "p.png").stat().st_size
    assert {"r04", "r08"} < {*opened.variants}
    succeeds("verify", bundle)
    assert not list(bundle.parent.glob("*.tune*"))


def test_a_search_that_was_killed_goes_on(
    succeeds: Run, run: Run, options, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    judge, left = Objective.judge, [5]

    def stop(self, *given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return judge(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "judge", stop)
        assert run(*options, "--macs", 0.75).exit_code == 130
    journal = bundle.with_name("bundle.tune.jsonl")
    assert len(journal.read_text().splitlines()) == 6
    count = [0]

    def note(self, *given):
        count[0] += 1
        return judge(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "judge", note)
        resumed = succeeds(*options, "--macs", 0.75, "--json")
    assert "Going on with 5 results" in resumed.stderr
    afresh = json.loads(succeeds(*options, "--macs", 0.75, "--name", "again", "--json").stdout)
    wanted = json.loads(resumed.stdout)["variants"][0]
    assert {**afresh["variants"][0], "name": "macs75"} == wanted


def test_milliseconds_and_a_scale(
    succeeds: Run, options, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a machine that takes a millisecond for each million; a real one scatters too much."""

    def pretend(self, lists):
        schedules = {tuple(degrees): Schedule.of(self.spec, degrees) for degrees in lists}
        return {degrees: s.macs(self.spec) / 1e6 for degrees, s in schedules.items()}

    monkeypatch.setattr(Tuner, "_measure", pretend)
    spec = Bundle.open(bundle).spec
    dense = Schedule.of(spec, 0).macs(spec) / 1e6
    given = ("--speedup", 1.3, "--budget-ms", round(dense / 1.2, 3), "--scale", "--json")
    fast, within = json.loads(succeeds(*options, *given).stdout)["variants"]
    opened = Bundle.open(bundle)
    assert fast["name"] == "fast1_3x"
    assert within["name"].startswith("in")
    assert fast["median_ms"] <= 1.01 * dense / 1.3
    assert within["median_ms"] <= 1.01 * dense / 1.2
    assert fast["constant"]["median_ms"] <= 1.01 * dense / 1.3
    assert opened.variant("fast1_3x").scale == fast["scale"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "--speedup, a --budget-ms or a share of --macs"),
        (("--macs", 0.5, "--backend", "tensorrt"), "--backend tensorrt: candidates are graphs"),
        (("--macs", 0.01), "no schedule of tiny costs so little"),
        (("--budget-ms", 1e6), "the uncompressed model costs no more than that"),
        (("--macs", 0.5, "--macs", 0.6, "--name", "x"), "--name is for one budget"),
    ],
)
def test_what_is_refused(fails: Run, options, more, says: str):
    fails(*options, *more, says=(says,))


def test_too_few_pictures(fails: Run, bundle: Path, photos: Path, bank_file: Path):
    says = ("--images: there are 12; 32 are the least",)
    fails("tune", bundle, "--images", photos, "--bank", bank_file, "--macs", 0.7, says=says)

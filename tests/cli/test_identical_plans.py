"""Plans without weights, from ``build --refit identical`` on; by a pretended TensorRT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.tensorrt.engine import TensorRtEngine

Run = Callable[..., Result]
BUILD = ("--targets", "4,8", "--backend", "tensorrt", "--refit", "identical")


@pytest.fixture
def planned(nvidia: Any, succeeds: Run, model: tuple[object, ...], tmp_path: Path) -> Path:
    succeeds("build", *model, *BUILD, "--out", tmp_path / "planned")
    return tmp_path / "planned"


def test_what_is_written(planned: Path, succeeds: Run):
    record = json.loads((planned / "r08.plan.json").read_text("utf-8"))
    assert (record["refit"], record["stripped"]) == ("identical", True)
    assert record["flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN"]
    assert Bundle.open(planned).plans == ("r04", "r08")
    text = succeeds("inspect", planned / "r08.plan").stdout
    assert f"identical: {len(record['refittable'])} weights" in text
    assert "its bundle gives it back the weights it was built with" in text


def test_the_lines_of_trtexec_that_build_the_same(nvidia, succeeds: Run, model, here: Path):
    options = (*model, *BUILD, "--dry-run", "--json")
    lines = json.loads(succeeds("build", *options).stdout)["trtexec"]
    assert len(lines) == 2
    assert all("--stripWeights" in line.split() for line in lines)
    assert json.loads(succeeds("build", *options, "--strip").stdout)["trtexec"] == lines
    assert not list(here.iterdir())


def test_it_is_timed(succeeds: Run, fails: Run, planned: Path):
    options = ("--backend", "tensorrt", "--batch", "1,8", "--seconds", 0, "--json")
    rows = json.loads(succeeds("bench", planned, *options).stdout)["rows"]
    assert {(row["backend"], row["variant"]) for row in rows} == {
        ("tensorrt", "r04"), ("tensorrt", "r08")
    }  # fmt: skip
    says = ("r04.plan takes its weights from its bundle", "--backend tensorrt")
    fails("bench", planned, "--backend", "trtexec", "--dry-run", says=says)


def test_it_is_verified(succeeds: Run, planned: Path, monkeypatch):
    seen: list[str] = []
    run = TensorRtEngine.run_all

    def note(engine: TensorRtEngine, images: Any) -> Any:
        seen.append(engine.variant.name)
        return run(engine, images)

    monkeypatch.setattr(TensorRtEngine, "run_all", note)
    document = json.loads(
        succeeds("verify", planned, "--backend", "tensorrt", "--atol", "1e9", "--json").stdout
    )
    assert {check["engine"] for check in document["engines"]} == {"r04.plan", "r08.plan"}
    assert set(seen) == {"r04", "r08"}


def test_a_refit_is_refused(fails: Run, planned: Path, bank_file: Path):
    plan = planned / "r08.plan"
    before = plan.read_bytes(), (planned / "r08.plan.json").read_bytes()
    says = (plan, "built with alone (refit: identical)", "build it again", "--refit qkv")
    for options in (("--source", 4), ("--scale", 0.2)):
        fails("refit", plan, "--bank", bank_file, *options, says=says)
    assert (plan.read_bytes(), (planned / "r08.plan.json").read_bytes()) == before


def test_triton_can_t_give_it_its_weights(fails: Run, planned: Path, here: Path):
    says = ("r04.plan takes its weights from its bundle", "--refit none, qkv or all")
    fails("triton", planned, "models", "--backend", "tensorrt", says=says)


def test_a_version_that_refits_wrongly(nvidia, fails: Run, model, here: Path):
    nvidia.trt.__version__ = "11.3.0.99"
    says = ("--refit qkv: TensorRT 11.3", "install 11.4, or choose --refit identical or none")
    fails("build", *model, "--backend", "tensorrt", says=says)
    assert not list(here.iterdir())


@pytest.mark.parametrize("version, told", [("10.3.0", True), ("10.9.0", False)])
def test_a_version_of_which_wrong_vits_were_reported(
    nvidia, succeeds: Run, model, version: str, told: bool
):
    nvidia.trt.__version__ = version
    said = succeeds("build", *model, *BUILD).stderr
    assert (f"TensorRT {version}: wrong ViTs were reported" in said) == told

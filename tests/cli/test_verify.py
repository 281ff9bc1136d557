from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.tensorrt.plan import open_plan, save_plan
from tocom_export.engines.verify import TOLERANCES, compare

Run = Callable[..., Result]
PAGE = (Path(__file__).parents[2] / "docs" / "precision.md").read_text("utf-8")


def strict(text: str) -> Any:
    """JSON as its standard has it, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_good_bundle(succeeds: Run, bundle: Path):
    text = succeeds("verify", bundle).stdout
    assert text.count("passed") == 2
    assert text.count("100.0 %") == 2
    assert "20 images" in text


def test_json_is_one_document(succeeds: Run, bundle: Path):
    document = strict(succeeds("verify", bundle, "--json").stdout)
    assert (document["bundle"], document["passed"]) == (str(bundle), True)
    engines = [(found["engine"], found["variant"]) for found in document["engines"]]
    assert engines == [("r04.onnx", "r04"), ("r08.onnx", "r08")]
    for found in document["engines"]:
        assert found["passed"] is found["finite"] is True
        assert (found["agreement"], found["beyond"]) == (100.0, 0)
        assert 0 < found["max_difference"] < found["tolerance"]


def test_images_of_ones_own(succeeds: Run, bundle: Path, photos: Path):
    document = strict(succeeds("verify", bundle, "--images", photos, "--json").stdout)
    assert [found["images"] for found in document["engines"]] == [12, 12]


def test_an_engine_that_differs(fails: Run, bundle: Path):
    result = fails(
        "verify", bundle, "--atol", "0", says=(bundle, "r04.onnx, r08.onnx differ"), status=1
    )
    assert result.stdout.count("FAILED") == 2


def test_an_engine_that_differs_in_json(run: Run, bundle: Path):
    result = run("verify", bundle, "--atol", "0", "--json")
    assert result.exit_code == 1
    document = strict(result.stdout)
    assert document["passed"] is False
    assert [found["passed"] for found in document["engines"]] == [False, False]


def test_the_help_and_the_page_have_the_limits(succeeds: Run):
    text = " ".join(succeeds("verify", "--help").stdout.split())
    for precision, share in TOLERANCES.items():
        assert f"{precision} ({share:g})" in text
        assert f"| `{precision}` | {share:g} |" in PAGE


@pytest.fixture
def planned(nvidia: Any, succeeds: Run, model: tuple[object, ...], tmp_path: Path) -> Path:
    """A bundle with plans of a pretended TensorRT, which give logits of their own."""
    options = ("--targets", "4,8", "--backend", "tensorrt", "--out", tmp_path / "planned")
    succeeds("build", *model, *options)
    return tmp_path / "planned"


def test_plans_are_run(fails: Run, succeeds: Run, planned: Path, monkeypatch):
    result = fails("verify", planned, says=("r04.plan, r08.plan differ",), status=1)
    assert [line for line in result.stdout.splitlines() if "r08.plan" in line and "FAILED" in line]
    monkeypatch.setattr(
        "tocom_export.engines.verify.compare",
        lambda run, images, oracle, *rest, **options: compare(
            oracle, images, oracle, *rest, **options
        ),
    )
    document = strict(succeeds("verify", planned, "--json").stdout)
    passed = [found["engine"] for found in document["engines"] if found["passed"]]
    assert passed == ["r04.onnx", "r08.onnx", "r04.plan", "r08.plan"]
    assert document["not_run"] == {}


def test_plans_that_can_t_be_run_are_named(
    nvidia, fails: Run, succeeds: Run, planned: Path, monkeypatch
):
    content, record = open_plan(planned / "r04.plan")
    flags = ("VERSION_COMPATIBLE",)
    save_plan(planned / "r04.plan", content, dataclasses.replace(record, flags=flags))
    content, record = open_plan(planned / "r08.plan")
    other = dataclasses.replace(record.variant, source=0)
    save_plan(planned / "r08.plan", content, dataclasses.replace(record, variant=other))
    result = succeeds("verify", planned)
    assert "r04.plan was not run: it brings code along" in result.stderr
    assert "r08.plan was not run: it was refitted apart from the graph (source 0" in result.stderr
    save_plan(planned / "r08.plan", content, record)
    nvidia.cuda.gpus = 0
    document = strict(succeeds("verify", planned, "--json").stdout)
    assert "no GPU that CUDA can use" in document["not_run"]["r08.plan"]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    nvidia.cuda.gpus = 1
    assert "tensorrt is not installed" in succeeds("verify", planned).stderr
    (planned / "r08.plan").write_bytes(b"damaged")
    fails("verify", planned, says=("r08.plan is damaged",))


def test_a_plan_and_a_graph_that_were_refitted_alike(
    nvidia, succeeds: Run, fails: Run, planned: Path
):
    """Without a bank, which the bundle has."""
    for name in ("r08.onnx", "r08.plan"):
        succeeds("refit", planned / name, "--bank", "none", "--no-verify")
    result = fails("verify", planned, "--json", says=("r04.plan, r08.plan differ",), status=1)
    assert strict(result.stdout)["not_run"] == {}


def test_an_engine_that_reads_other_weights(fails: Run, bundle: Path, misreads: Callable):
    misreads(bundle)
    assert Bundle.open(bundle, hashes=True)
    fails("verify", bundle, says=(f"{bundle}: r08.onnx differs",), status=1)


@pytest.mark.parametrize("as_json", [True, False])
def test_logits_that_are_no_numbers(run: Run, bundle: Path, nan_in: Callable, as_json: bool):
    nan_in(bundle / "r08.safetensors")
    result = run("verify", bundle, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    if as_json:
        four, eight = strict(result.stdout)["engines"]
        assert (four["finite"], four["passed"]) == (True, True)
        assert (eight["finite"], eight["passed"]) == (False, False)
    else:
        assert "NO" in result.stdout
        assert "r08.onnx differs" in result.stderr


@pytest.mark.parametrize("name", ["weights.safetensors", "r08.safetensors", "r08.onnx"])
def test_a_changed_byte(fails: Run, bundle: Path, damage: Callable, name: str):
    damage(bundle / name)
    fails("verify", bundle, says=(bundle / name, "SHA-256 differs"))


def test_a_truncated_file(fails: Run, bundle: Path):
    file = bundle / "r08.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    fails("verify", bundle, says=(file, "bytes, the manifest says"))


@pytest.mark.parametrize("name", ["none", "file"])
def test_no_bundle(fails: Run, here: Path, name: str):
    (here / "file").touch()
    fails("verify", name, says=(name, "is not a bundle"))


def test_images_that_are_not_there(fails: Run, bundle: Path, tmp_path: Path):
    fails("verify", bundle, "--images", tmp_path / "none", says=(tmp_path / "none", "not a folder"))


def test_an_image_that_is_none(fails: Run, bundle: Path, photos: Path):
    (photos / "a" / "broken.png").write_bytes(b"not an image")
    says = (photos / "a" / "broken.png", "is not an image")
    fails("verify", bundle, "--images", photos, says=says)


def test_without_torch(fails: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tocom_export.cli.commands.verify.is_installed", lambda *_: False)
    fails("verify", bundle, says=("torch", "pip install 'tocom-export[torch]'"))


@pytest.mark.parametrize("name", ["v[1]", "v[bold]", "v[/1]"])
def test_a_path_with_brackets(succeeds: Run, bundle: Path, here: Path, name: str):
    """Which the table's library would take for markup."""
    (here / name).parent.mkdir(exist_ok=True)
    bundle.rename(here / name)
    assert f"{name} against PyTorch" in succeeds("verify", name).stdout


@pytest.mark.parametrize("atol", ["-1", "x"])
def test_a_tolerance_that_is_none(fails: Run, bundle: Path, atol: str):
    fails("verify", bundle, "--atol", atol, says=("--atol", atol))

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.accuracy import ALLOWED_DIFFERENCE, ALLOWED_LOSS
from tocom_export.engines.tensorrt.plan import open_plan, save_plan
from tocom_export.engines.verify import TOLERANCES, compare
from tocom_export.study.accuracy import find_interval
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.opening import open_images

Run = Callable[..., Result]
COUNT = 48
"""Of the fixture ``pictures``."""
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


@pytest.fixture
def data(bundle: Path, labelled: Callable[..., Path]) -> Path:
    """The pictures under the classes that the bundle's degree 8 says, but for one in four."""
    images = [pixels for pixels, _ in batches(labelled("blank", [0] * COUNT), bundle)]
    said = Bundle.open(bundle).engine("r08").run(np.concatenate(images)).argmax(axis=1)
    said[::4] = (said[::4] + 1) % 10
    return labelled("data", said)


def batches(place: Path, bundle: Path) -> EvalData:
    opened = Bundle.open(bundle)
    return EvalData(open_images(place), opened.spec, opened.preprocess)


@pytest.fixture
def half(succeeds: Run, model: tuple[object, ...], here: Path) -> Path:
    """The same bundle in bf16, whose logits are not judged where images are labelled."""
    succeeds("build", *model, "--targets", "4,8", "--precision", "bf16", "--out", "half")
    return here / "half"


def test_accuracy_on_labelled_images(succeeds: Run, bundle: Path, data: Path):
    document = strict(succeeds("verify", bundle, "--data", data, "--json").stdout)
    assert document["passed"] is True
    assert [found["engine"] for found in document["engines"]] == ["r04.onnx", "r08.onnx"]
    four, eight = document["rows"]
    assert {(r["precision"], r["backend"], r["images"]) for r in (four, eight)} == {
        ("fp32", "onnx", COUNT)
    }
    assert (four["variant"], eight["variant"]) == ("r04", "r08")
    assert eight["accuracy"] == eight["pytorch"] == 75
    assert (eight["accuracy_low"], eight["accuracy_high"]) == find_interval(75, COUNT)
    assert (eight["difference"], eight["agreement"], eight["passed"]) == (0, 100, True)
    assert eight["difference_low"] == -eight["difference_high"] < 0
    assert eight["pytorch_weights"] == "fp32"
    text = succeeds("verify", bundle, "--data", data).stdout
    assert text.count("passed") == 4
    assert "75.00 ± " in text
    assert f"accuracy against PyTorch, {COUNT} images" in text


def test_logits_don_t_decide_beside_accuracy(
    succeeds: Run, fails: Run, half: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(TOLERANCES, "bf16", 1e-9)
    fails("verify", half, says=("r04.onnx, r08.onnx differ",), status=1)
    result = succeeds("verify", half, "--data", data)
    assert result.stdout.count("not judged") == 2
    assert "weights, rounded to bf16" in result.stderr
    assert f"{COUNT} images can't rule out" in result.stderr
    document = strict(succeeds("verify", half, "--data", data, "--json").stdout)
    assert [(c["judged"], c["passed"]) for c in document["engines"]] == [(False, True)] * 2
    assert [row["pytorch_weights"] for row in document["rows"]] == ["bf16"] * 2
    options = ("--data", data, "--atol", "0", "-q")
    fails("verify", half, *options, says=("r04.onnx, r08.onnx differ",), status=1)


def test_logits_decide_in_fp32(
    fails: Run, bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(TOLERANCES, "fp32", 1e-9)
    fails("verify", bundle, "--data", data, says=("r04.onnx, r08.onnx differ",), status=1)


def test_an_engine_that_is_right_less_often(
    fails: Run, run: Run, half: Path, data: Path, misreads: Callable
):
    misreads(half)
    says = ("half: r08 by onnx: accuracy is", "points or more below PyTorch's, 0.3 allowed.")
    result = fails("verify", half, "--data", data, "-q", says=says, status=1)
    assert result.stdout.count("FAILED") == 1
    result = run("verify", half, "--data", data, "--json")
    assert result.exit_code == 1
    document = strict(result.stdout)
    four, eight = document["rows"]
    assert (document["passed"], four["passed"], eight["passed"]) == (False, True, False)
    assert eight["difference"] == pytest.approx(eight["accuracy"] - eight["pytorch"])
    assert eight["difference_low"] < eight["difference"] < eight["difference_high"] < -0.3
    assert eight["agreement"] < 100


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_labelled_images_and_no_numbers(
    run: Run, bundle: Path, half: Path, data: Path, nan_in: Callable, precision: str
):
    broken = {"fp32": bundle, "bf16": half}[precision]
    nan_in(broken / "r08.safetensors")
    result = run("verify", broken, "--data", data, "--json")
    assert result.exit_code == 1
    assert f"r08 by onnx: NaN or Inf on {COUNT} of {COUNT} images" in result.stderr
    assert [row["finite"] for row in strict(result.stdout)["rows"]] == [True, False]


@pytest.mark.parametrize("case", ["missing", "classes", "names", "flat", "unnamed"])
def test_images_that_are_not_labelled_for_it(
    fails: Run, bundle: Path, photos: Path, labelled: Callable, case: str
):
    swapped = ["class-b", "class-a", *(f"class-{letter}" for letter in "cdefghij")]
    place, says = {
        "missing": ("nowhere", ("nowhere: no such folder",)),
        "classes": (photos, (f"--data {photos} has 2 classes", f"{bundle} has a head of 10")),
        "names": (labelled("swapped", [0] * COUNT, swapped), ("'class-b' where", "same order")),
        "flat": (photos / "a", (f"{photos / 'a'}: not images as <folder>/<class>/<image>",)),
        "unnamed": ("hfds/", ("hfds/",)),
    }[case]
    fails("verify", bundle, "--data", place, says=says)


@pytest.mark.parametrize("option", [("--data-root", "there"), ("--download",)], ids=str)
def test_options_of_data_alone(fails: Run, bundle: Path, option: tuple[str, ...]):
    fails("verify", bundle, *option, says=("--data-root and --download are for --data.",))


def test_the_page_has_the_limits_of_accuracy(succeeds: Run):
    text = " ".join(succeeds("verify", "--help").stdout.split())
    assert f"worse by more than {ALLOWED_LOSS} points" in text
    assert f"more than {ALLOWED_LOSS} points" in PAGE
    more = " ".join(succeeds("evaluate", "--help").stdout.split())
    assert f"differs by more than {ALLOWED_DIFFERENCE} points in fp32" in more
    assert f"lower by more than {ALLOWED_LOSS} points" in more
    assert f"{ALLOWED_DIFFERENCE} points in fp32" in PAGE


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_backend(succeeds: Run, bundle: Path, data: Path, backend: str):
    if backend == "openvino":
        pytest.importorskip("openvino")
    options = ("verify", bundle, "--backend", backend, "--data", data)
    document = strict(succeeds(*options, "--json").stdout)
    for part in ("engines", "rows"):
        assert [found["backend"] for found in document[part]] == [backend] * 2
    assert [found["engine"] for found in document["engines"]] == ["r04.onnx", "r08.onnx"]
    lines = succeeds(*options).stdout.splitlines()
    assert sum(f" {backend} " in line for line in lines) == 4


def test_plans_alone(nvidia: Any, fails: Run, succeeds: Run, planned: Path, monkeypatch):
    says = ("r04.plan, r08.plan differ",)
    fails("verify", planned, "--backend", "tensorrt", says=says, status=1)
    monkeypatch.setattr(
        "tocom_export.engines.verify.compare",
        lambda run, images, oracle, *rest, **options: compare(
            oracle, images, oracle, *rest, **options
        ),
    )
    document = strict(succeeds("verify", planned, "--backend", "tensorrt", "--json").stdout)
    found = [(engine["engine"], engine["backend"]) for engine in document["engines"]]
    assert found == [("r04.plan", "tensorrt"), ("r08.plan", "tensorrt")]
    says = ("--backend tensorrt-rtx", "r04.plan can't be verified: it is of tensorrt.")
    fails("verify", planned, "--backend", "tensorrt-rtx", says=says)
    nvidia.cuda.gpus = 0
    fails("verify", planned, "--backend", "tensorrt", says=("no GPU that CUDA can use",))


def test_plans_beside_graphs_on_labelled_images(run: Run, planned: Path, data: Path):
    """The pretended library's logits are none of the model's."""
    result = run("verify", planned, "--data", data, "--json")
    assert result.exit_code == 1
    rows = strict(result.stdout)["rows"]
    assert [(row["variant"], row["backend"], row["passed"]) for row in rows] == [
        ("r04", "onnx", True), ("r08", "onnx", True),
        ("r04", "tensorrt", False), ("r08", "tensorrt", False),
    ]  # fmt: skip
    assert "r08 by tensorrt: accuracy is" in result.stderr


def test_plans_that_are_not_there(fails: Run, bundle: Path):
    fails("verify", bundle, "--backend", "tensorrt", says=("has no plan for r04", "none"))


@pytest.mark.parametrize("name", ["v[1]", "v[bold]", "v[/1]"])
def test_a_path_with_brackets(succeeds: Run, bundle: Path, here: Path, name: str):
    """Which the table's library would take for markup."""
    (here / name).parent.mkdir(exist_ok=True)
    bundle.rename(here / name)
    assert f"{name} against PyTorch" in succeeds("verify", name).stdout


@pytest.mark.parametrize("atol", ["-1", "x"])
def test_a_tolerance_that_is_none(fails: Run, bundle: Path, atol: str):
    fails("verify", bundle, "--atol", atol, says=("--atol", atol))

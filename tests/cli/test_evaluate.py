from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from tocom_export.bundle.manifest import MANIFEST
from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.compression.method import Method
from tocom_export.compression.rules import list_degrees
from tocom_export.compression.schedule import Schedule
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.study.accuracy import Difference, find_interval, format_accuracy
from tocom_export.study.results import Results, Row, parse_row
from tocom_export.training.building import vit_from_spec
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.opening import open_images
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit
from tocom_export.training.torch_engine import StoredOracle

Run = Callable[..., Result]
Options = tuple[object, ...]
Predict = Callable[..., np.ndarray]
Labelled = Callable[..., Path]

SCALES = (0.01, 0.02, 0.05, 0.08, 0.1, 0.12, 0.15)
COUNT = 48
"""Of the fixture ``pictures``."""


@pytest.fixture
def predict(labelled: Labelled, spec: VitSpec, bank_file: Path) -> Predict:
    """What a checkpoint says of the pictures, in plain PyTorch."""
    (pixels,) = (
        images
        for images, _ in EvalData(open_images(labelled("blank", [0] * COUNT)), spec, Preprocess())
    )

    @torch.inference_mode()
    def call(
        file: Path, source: int, target: int | tuple[int, ...], scale: float | None = None,
        method: str = "tome", bank: Path = bank_file,
    ) -> np.ndarray:  # fmt: skip
        vit = vit_from_spec(spec)
        vit.load_state_dict(load_file(file))
        model = CompressedVit(vit, Method(method), spec.model).eval()
        side = None
        if scale is not None:
            steps = TrainableBank.from_bank(ToComBank.load(bank), spec)
            side = steps.side(source, Schedule.of(spec, target).targets, scale)
        return model(pixels, target, side).argmax(dim=-1).numpy()

    return call


@pytest.fixture(scope="session")
def plain(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable, spec: VitSpec,
    info: ModelInfo,
) -> Path:  # fmt: skip
    """A checkpoint of degree 0, of the same classes as ``checkpoint``."""
    metadata = to_metadata(ModelInfo(spec, 0, Method("tome"), info.classes))
    return make_checkpoint(tmp_path_factory.mktemp("plain"), spec, seed=1, metadata=metadata)


@pytest.fixture
def data(labelled: Labelled, predict: Predict, checkpoint: Path, plain: Path) -> Path:
    """Half the labels are what one model says, half what the other does."""
    one, two = predict(checkpoint, 4, 0), predict(plain, 0, 0)
    return labelled("moons", np.where(np.arange(COUNT) % 2, one, two))


def percent(predicted: np.ndarray, data: Path) -> float:
    """Accuracy on labelled pictures."""
    images = open_images(data)
    labels = np.array([images.read(index)[1] for index in range(len(images))])
    return 100 * int((predicted == labels).sum()) / len(labels)


def rows_of(result: Result) -> list[dict[str, Any]]:
    return json.loads(result.stdout)["rows"]


def without_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "throughput"} for row in rows]


def test_rows_are_what_pytorch_says(
    succeeds: Run, checkpoint: Path, plain: Path, bank_file: Path, data: Path, predict: Predict,
    here: Path,
):  # fmt: skip
    plain = Path(shutil.copy(plain, here / "plain.safetensors"))
    options = ("--data", data, "--bank", bank_file, "--targets", "0,4,8,16", "--scale", 0.15)
    result = succeeds("evaluate", plain, checkpoint, *options, "--seed", 3, "--batch", 20, "--json")
    rows = rows_of(result)
    degrees = [(source, target) for source in (0, 4) for target in (0, 4, 8, 16)]
    assert [(row["source"], row["target"]) for row in rows] == degrees
    trained = {0: percent(predict(plain, 0, 0), data), 4: percent(predict(checkpoint, 4, 4), data)}
    for row in rows:
        source, target = row["source"], row["target"]
        file = plain if source == 0 else checkpoint
        assert row.pop("throughput") > 0
        expected = {
            "dataset": "moons", "method": "tome", "source": source, "target": target, "seed": 3,
            "images": COUNT, "baseline": percent(predict(file, source, target), data),
            "tocom": percent(predict(file, source, target, 0.15), data),
            "reference": trained.get(target), "model": file.name, "bank": "tocom",
            "variant": f"r{target:02d}", "precision": "fp32", "backend": "torch",
        }  # fmt: skip
        expected["accuracy"] = expected["tocom"]
        interval = find_interval(expected["tocom"], COUNT)
        expected["accuracy_low"], expected["accuracy_high"] = interval
        if source == target:
            assert expected["tocom"] == expected["baseline"]
        else:
            expected["scale"] = 0.15
        assert row == expected
    assert len({row["baseline"] for row in rows}) > 4  # or the above would say little
    assert sum(row["baseline"] != row["tocom"] for row in rows) > 3


def test_the_table(succeeds: Run, checkpoint: Path, bank_file: Path, data: Path, predict: Predict):
    text = succeeds("evaluate", checkpoint, "--data", data, "--bank", bank_file).stdout
    lines = text.splitlines()
    assert lines[0] == f"moons, {COUNT} images, tome"
    assert [line.split()[1:4] for line in lines[2:]] == [
        ["4", "→", str(target)] for target in (0, 4, 8, 12, 16)
    ]
    assert all(line.split()[0] == "checkpoint" for line in lines[2:])
    reduced = [format_accuracy(percent(predict(checkpoint, 4, t), data), COUNT) for t in (0, 4, 8)]
    assert all(" ± " in cell for cell in reduced)
    assert all(cell in line for cell, line in zip(reduced, lines[2:], strict=False))


def test_long_names_are_not_folded(succeeds: Run, checkpoint: Path, data: Path, here: Path):
    model = shutil.copy(checkpoint, here / f"{'long-' * 10}.safetensors")
    options = (model, "--data", data, "--bank", "none", "--targets", 4)
    assert "long-" * 10 in succeeds("evaluate", *options).stdout


def test_without_a_bank(succeeds: Run, checkpoint: Path, data: Path, predict: Predict):
    options = ("--data", data, "--bank", "none", "--targets", 8, "--json")
    (row,) = rows_of(succeeds("evaluate", checkpoint, *options))
    assert row["baseline"] == percent(predict(checkpoint, 4, 8), data)
    assert row["tocom"] is row["reference"] is None
    assert row["accuracy"] == row["baseline"]
    assert "scale" not in row


def test_pruning(
    succeeds: Run, checkpoint: Path, data: Path, predict: Predict, make_bank: Callable,
    spec: VitSpec, tmp_path: Path,
):  # fmt: skip
    bank = tmp_path / "evit.safetensors"
    make_bank(spec, method="evit").save(bank)
    options = ("--data", data, "--bank", bank, "--targets", "4,8", "--json")
    four, eight = rows_of(succeeds("evaluate", checkpoint, *options))
    assert (four["method"], eight["method"]) == ("evit", "evit")
    assert four["baseline"] == percent(predict(checkpoint, 4, 4, method="evit"), data)
    assert four["baseline"] != percent(predict(checkpoint, 4, 4), data)
    said = predict(checkpoint, 4, 8, 0.1, method="evit", bank=bank)
    assert eight["tocom"] == percent(said, data)
    alone = ("--data", data, "--bank", "none", "--method", "evit", "--targets", 4, "--json")
    (again,) = rows_of(succeeds("evaluate", checkpoint, *alone))
    assert again["baseline"] == four["baseline"]


@pytest.fixture
def strong(make_bank: Callable, spec: VitSpec, tmp_path: Path) -> Path:
    """A bank with which each scale says something else."""
    bank = make_bank(spec, rank=16, seed=5)
    file = tmp_path / "strong.safetensors"
    bank.save(file)
    return file


@pytest.mark.parametrize("best", [0.01, 0.05, 0.15])
def test_the_scale_that_is_best_on_held_out_images(
    succeeds: Run, checkpoint: Path, data: Path, strong: Path, labelled: Labelled,
    predict: Predict, best: float,
):  # fmt: skip
    """Their labels are what the model says at that scale."""
    said = {scale: predict(checkpoint, 4, 12, scale, bank=strong) for scale in SCALES}
    assert all((said[best] != said[other]).any() for other in SCALES if other != best)
    held_out = labelled("held-out", said[best])
    options = ("--data", data, "--bank", strong, "--targets", "4,12", "--held-out", held_out)
    source, row = rows_of(succeeds("evaluate", checkpoint, *options, "--scale", "auto", "--json"))
    assert row["scale"] == best
    assert row["tocom"] == percent(said[best], data)
    assert "scale" not in source


def test_of_equal_scales_the_one_of_training_is_taken(
    succeeds: Run, checkpoint: Path, data: Path, make_bank: Callable, spec: VitSpec, tmp_path: Path,
    labelled: Labelled,
):  # fmt: skip
    bank = make_bank(spec)
    factors = (0 * factor for factor in bank.factors().values())
    nothing = ToComBank(*factors, method=bank.method, model=bank.model)
    nothing.save(tmp_path / "nothing.safetensors")
    options = ("--data", data, "--bank", tmp_path / "nothing.safetensors", "--targets", 8)
    options = (*options, "--scale", "auto", "--held-out", labelled("held-out", [0] * COUNT))
    (row,) = rows_of(succeeds("evaluate", checkpoint, *options, "--json"))
    assert row["scale"] == 0.1
    assert row["tocom"] == row["baseline"]


@pytest.mark.parametrize("options", [("--scale", "auto"), ("--held-out", "more"),
                                     ("--held-out", "more", "--scale", 0.1)])  # fmt: skip
def test_auto_and_held_out_images_need_each_other(
    fails: Run, checkpoint: Path, bank_file: Path, options: Options
):
    model = (checkpoint, "--data", "images", "--bank", bank_file)
    fails("evaluate", *model, *options, says=("--scale auto", "--held-out"))


def test_held_out_images_that_are_the_test_images(fails: Run, checkpoint: Path, bank_file: Path):
    options = ("--bank", bank_file, "--scale", "auto", "--data", "images", "--held-out", "images")
    fails("evaluate", checkpoint, *options, says=("--held-out is the same as --data",))


@pytest.mark.parametrize("compensated", [True, False])
def test_a_bundle_says_what_its_checkpoint_says(
    succeeds: Run, checkpoint: Path, bank_file: Path, data: Path, compensated: bool
):
    bank = bank_file if compensated else "none"
    model = ("--checkpoint", checkpoint, "--bank", bank, "--no-verify", "--targets", "0,4,8")
    succeeds("build", *model, "--scale", 0.15, "--out", "bundle")
    result = succeeds("evaluate", "bundle", "--data", data, "--check", "--json")
    options = ("--bank", bank, "--scale", 0.15, "--targets", "0,4,8", "--data", data, "--json")
    expected = without_speed(rows_of(succeeds("evaluate", checkpoint, *options)))
    assert {row["model"] for row in expected} == {checkpoint.name}
    assert without_speed(rows_of(result)) == [
        {**row, "model": "bundle", "backend": "onnx"} for row in expected
    ]
    gains = [row["tocom"] != row["baseline"] for row in expected if row["tocom"] is not None]
    assert any(gains) is compensated
    for row, check in zip(expected, json.loads(result.stdout)["checks"], strict=True):
        served = row["tocom"] if compensated else row["baseline"]
        low, high = Difference(0, 0, COUNT).interval
        assert check == {
            "bundle": "bundle", "variant": row["variant"], "images": COUNT, "engine": served,
            "pytorch": served, "difference": 0, "images_that_differ": 0, "passed": True,
            "precision": "fp32", "backend": "onnx", "accuracy": served,
            "accuracy_low": row["accuracy_low"], "accuracy_high": row["accuracy_high"],
            "pytorch_weights": "fp32", "difference_low": low, "difference_high": high,
            "agreement": 100, "finite": True,
        }  # fmt: skip


def test_a_bundle_of_scale_zero(succeeds: Run, checkpoint: Path, bank_file: Path, data: Path):
    model = ("--checkpoint", checkpoint, "--bank", bank_file, "--no-verify", "--targets", 8)
    succeeds("build", *model, "--scale", 0, "--out", "bundle")
    (row,) = rows_of(succeeds("evaluate", "bundle", "--data", data, "--json"))
    assert (row["scale"], row["tocom"]) == (0, row["baseline"])


def test_an_engine_that_reads_other_weights(
    run: Run, fails: Run, bundle: Path, data: Path, misreads: Callable
):
    misreads(bundle)
    options = ("evaluate", bundle, "--data", data, "--check")
    says = (f"{bundle} at r08: accuracy is", "points off PyTorch's, ±0.1 allowed")
    result = fails(*options, says=says, status=1)
    assert result.stdout.count("FAILED") == result.stdout.count("passed") == 1
    result = run(*options, "--json")
    assert result.exit_code == 1
    four, eight = json.loads(result.stdout)["checks"]
    assert (four["passed"], eight["passed"]) == (True, False)
    assert eight["images_that_differ"] > 0
    assert eight["difference"] == pytest.approx(eight["engine"] - eight["pytorch"])
    assert eight["difference"] != 0


def test_an_oracle_that_differs(
    fails: Run, bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
):
    runner = StoredOracle.runner

    def negate(*arguments: Any) -> Callable:
        run = runner(*arguments)
        return lambda images: -run(images)

    monkeypatch.setattr(StoredOracle, "runner", negate)
    says = (f"{bundle} at r04: accuracy", f"; {bundle} at r08: accuracy")
    fails("evaluate", bundle, "--data", data, "--check", says=says, status=1)


def test_outputs_that_are_no_numbers(fails: Run, bundle: Path, data: Path, nan_in: Callable):
    nan_in(bundle / "r08.safetensors")
    options = ("evaluate", bundle, "--data", data, "--variants", 8, "--check", "-q")
    says = (f"{bundle} at r08: NaN or Inf on {COUNT} of {COUNT} images.",)
    fails(*options, says=says, status=1)


def test_a_precision_is_judged_by_what_it_loses_for_certain(
    succeeds: Run, fails: Run, model: Options, checkpoint: Path, predict: Predict,
    labelled: Labelled, misreads: Callable,
):  # fmt: skip
    """Of 48 images few may differ, and say nothing; a wrong weight does."""
    data = labelled("sure", predict(checkpoint, 4, 8, 0.1))
    succeeds("build", *model, "--targets", "4,8", "--precision", "bf16", "--out", "half")
    options = ("evaluate", "half", "--data", data, "--check")
    result = succeeds(*options)
    assert "PyTorch ran r04, r08 with the bundle's own weights, rounded to bf16" in result.stderr
    assert f"{COUNT} images can't rule out that" in result.stderr
    checks = json.loads(succeeds(*options, "--json").stdout)["checks"]
    assert {(check["precision"], check["pytorch_weights"]) for check in checks} == {
        ("bf16", "bf16")
    }
    misreads(Path("half"))
    says = ("half at r08: accuracy is", "points or more below PyTorch's, 0.3 allowed")
    fails(*options, "--variants", 8, "-q", says=says, status=1)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_backend(succeeds: Run, bundle: Path, data: Path, backend: str):
    if backend == "openvino":
        pytest.importorskip("openvino")
    options = (bundle, "--data", data, "--check", "--json")
    document = json.loads(succeeds("evaluate", *options, "--backend", backend).stdout)
    rows, checks = document["rows"], document["checks"]
    assert [row["backend"] for row in (*rows, *checks)] == [backend] * 4
    assert [check["passed"] for check in checks] == [True] * 2
    # OpenVINO computes in what the CPU is fastest in, and a row says what that is.
    precision = {"fp32"} if backend == "onnx" else {"fp32", "bf16"}
    assert {row["precision"] for row in (*rows, *checks)} <= precision
    if rows[0]["precision"] == "fp32":
        found = [{**row, "backend": "onnx"} for row in rows]
        expected = rows_of(succeeds("evaluate", *options))
        assert without_speed(found) == without_speed(expected)


def test_plans(nvidia: Any, succeeds: Run, model: Options, data: Path):
    """Of a pretended TensorRT: what alone is run, is a refit to the weights that all share."""
    succeeds("build", *model, "--targets", "4,8", "--backend", "tensorrt", "--out", "planned")
    options = ("planned", "--data", data, "--backend", "tensorrt", "--batch", 32, "--json")
    four, eight = rows_of(succeeds("evaluate", *options))
    assert (four["backend"], four["images"]) == ("tensorrt", COUNT)
    assert four["baseline"] == four["tocom"]
    assert eight["accuracy"] == eight["tocom"]


def test_a_backend_is_a_bundle_s(fails: Run, checkpoint: Path, bundle: Path):
    options = (checkpoint, "--bank", "none", "--data", "images", "--backend", "onnx")
    fails("evaluate", *options, says=("--backend chooses what runs a bundle", "name a bundle"))
    fails("evaluate", bundle, "--data", "x", "--backend", "torch", says=("--backend", "torch"))


def test_plans_that_are_not_there(fails: Run, bundle: Path, data: Path):
    options = (bundle, "--data", data, "--backend", "tensorrt")
    fails("evaluate", *options, says=("has no plan for r04",))


def test_outputs_that_are_no_numbers_are_told(
    succeeds: Run, bundle: Path, data: Path, nan_in: Callable
):
    nan_in(bundle / "r08.safetensors")
    result = succeeds("evaluate", bundle, "--data", data, "--json")
    assert [row["tocom"] for row in rows_of(result)][1] == 0
    assert f"{COUNT} outputs hold values that are no numbers" in result.stderr


def test_a_check_without_a_bundle(fails: Run, checkpoint: Path, bank_file: Path):
    options = (checkpoint, "--bank", bank_file, "--data", "images", "--check")
    fails("evaluate", *options, says=("--check", "name a bundle"))


def recorded(bundle: Path) -> dict[str, float]:
    manifest: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    return dict(manifest.get("accuracy", {}))


def test_accuracy_is_recorded(succeeds: Run, bundle: Path, data: Path):
    before = json.loads((bundle / MANIFEST).read_text())
    options = ("--data", data, "--variants", "8,r04")
    rows = rows_of(succeeds("evaluate", bundle, *options, "--json"))
    assert recorded(bundle) == {}
    result = succeeds("evaluate", bundle, *options, "--record")
    assert f"Recorded the accuracy of {bundle} at " in result.stderr
    accuracy = {row["variant"]: row["tocom"] for row in rows}
    assert recorded(bundle) == accuracy
    assert list(recorded(bundle)) == ["r04", "r08"]
    assert list(accuracy.values()) != [row["baseline"] for row in rows]  # not without the bank
    now = json.loads((bundle / MANIFEST).read_text())
    assert now.pop("sha256") != before.pop("sha256")
    assert now == {**before, "accuracy": accuracy}
    opened = Bundle.open(bundle, hashes=True)
    assert opened.accuracy == accuracy
    assert "Recorded" not in succeeds("evaluate", bundle, *options, "--record", "-q").stderr


def test_what_is_recorded_of_other_variants_stays(succeeds: Run, bundle: Path, data: Path):
    edited = json.loads((bundle / MANIFEST).read_text()) | {"accuracy": {"r08": 12.5, "r04": 99.5}}
    (bundle / MANIFEST).write_text(json.dumps(edited))
    options = ("--data", data, "--variants", 8, "--record", "--json")
    (row,) = rows_of(succeeds("evaluate", bundle, *options))
    assert list(recorded(bundle).items()) == [("r04", 99.5), ("r08", row["tocom"])]
    assert row["tocom"] != 12.5


def test_a_bundle_beside_a_checkpoint(succeeds: Run, bundle: Path, plain: Path, data: Path):
    before = plain.read_bytes()
    options = ("--data", data, "--bank", "none", "--targets", 4, "--record", "--json")
    options = (*options, "--variants", "r04")
    dense, served = rows_of(succeeds("evaluate", plain, bundle, *options))
    assert recorded(bundle) == {"r04": served["tocom"]}
    assert served["tocom"] != dense["baseline"]
    assert plain.read_bytes() == before


def test_only_bundles_have_a_record(fails: Run, checkpoint: Path, bank_file: Path, here: Path):
    options = (checkpoint, "--bank", bank_file, "--data", "images", "--record")
    says = ("--record writes into a bundle's manifest", "name a bundle")
    fails("evaluate", *options, says=says)
    Results().save(here / "study" / "results.json")
    fails("evaluate", "--record", "--out", "study", says=("name a checkpoint", "--out alone"))


def test_a_refit_drops_what_was_recorded_of_its_variant(
    succeeds: Run, bundle: Path, bank_file: Path, data: Path
):
    succeeds("evaluate", bundle, "--data", data, "--record")
    before = recorded(bundle)
    assert list(before) == ["r04", "r08"]
    options = ("--bank", bank_file, "--scale", 0.2, "--no-verify")
    succeeds("refit", bundle / "r08.onnx", *options)
    assert recorded(bundle) == {"r04": before["r04"]}


@pytest.mark.parametrize("options", [("--scale", 0.1), ("--bank", "none"), ("--method", "evit"),
                                     ("--scale", "auto", "--held-out", "more")])  # fmt: skip
def test_what_a_bundle_has_baked_in(fails: Run, bundle: Path, options: Options, data: Path):
    fails("evaluate", bundle, "--data", data, *options, says=(options[0], "baked in"))


@pytest.mark.parametrize("options", [("--targets", 4), ("--schedule", "fast=4,2,2,0")])
def test_a_bundle_has_variants_of_its_own(fails: Run, bundle: Path, options: Options):
    says = (f"{options[0]} is for checkpoints", "--variants")
    fails("evaluate", bundle, "--data", "images", *options, says=says)


def test_a_variant_that_the_bundle_lacks(fails: Run, bundle: Path):
    options = ("--data", "images", "--variants", "4,16")
    fails("evaluate", bundle, *options, says=(bundle, "no variant r16", "r04, r08"))


def test_variants_are_a_bundle_s(fails: Run, checkpoint: Path, bank_file: Path):
    options = (checkpoint, "--bank", bank_file, "--data", "images", "--variants", 4)
    fails("evaluate", *options, says=("--variants", "name a bundle"))


def test_a_refitted_variant(succeeds: Run, fails: Run, bundle: Path, bank_file: Path, data: Path):
    options = ("--bank", bank_file, "--scale", 0.2, "--no-verify")
    succeeds("refit", bundle / "r08.onnx", *options)
    says = ("r08.onnx was refitted", "no longer the bundle's")
    fails("evaluate", bundle, "--data", data, says=says)
    (row,) = rows_of(succeeds("evaluate", bundle, "--data", data, "--variants", 4, "--json"))
    assert row["variant"] == "r04"


FAST = (6, 4, 2, 0)
SCHEDULE = ("--schedule", f"fast={','.join(map(str, FAST))}")


def test_a_schedule_of_a_checkpoint(
    succeeds: Run, checkpoint: Path, bank_file: Path, data: Path, predict: Predict, here: Path
):
    options = ("--data", data, "--bank", bank_file, *SCHEDULE, "--scale", 0.15, "--out", "study")
    (fast,) = rows_of(succeeds("evaluate", checkpoint, *options, "--json"))
    assert (fast["variant"], fast["schedule"], fast["target"]) == ("fast", "fast", None)
    assert fast["baseline"] == percent(predict(checkpoint, 4, FAST), data)
    assert fast["accuracy"] == fast["tocom"] == percent(predict(checkpoint, 4, FAST, 0.15), data)
    assert fast["tocom"] != fast["baseline"]
    page = (here / "study" / "results.md").read_text()
    assert "| fast | moons | ToMe | ToCom | 4 |" in page
    assert "svg" not in page
    again, eight = rows_of(succeeds("evaluate", checkpoint, *options, "--targets", 8, "--json"))
    assert (again["schedule"], eight["target"]) == ("fast", 8)
    table = succeeds("evaluate", checkpoint, *options).stdout
    assert "4 → fast" in table


def test_a_rule_is_the_list_that_it_makes(
    succeeds: Run, checkpoint: Path, bank_file: Path, data: Path, spec: VitSpec
):
    degrees = ",".join(map(str, list_degrees(spec, "every:2:4")))
    options = (checkpoint, "--data", data, "--bank", bank_file, "--json", "--schedule")
    rule, listed = (
        rows_of(succeeds("evaluate", *options, f"fast={text}")) for text in ("every:2:4", degrees)
    )
    assert without_speed(rule) == without_speed(listed)


@pytest.mark.parametrize("options, says", [
    ((*SCHEDULE, *SCHEDULE), ("fast is asked for twice",)),
    (("--schedule", "fast=4,4"), ("4 layers", "not 2")),
    (("--schedule", "fast"), ("--schedule", "'fast'")),
    (("--schedule", "fast=every:0"), ("--schedule", "'every:0' is not every:K")),
    (("--schedule", "fast=every:9"), ("every:9:16: with tokens", "choose every:")),
])  # fmt: skip
def test_schedules_that_make_no_sense(
    fails: Run, checkpoint: Path, options: Options, says: tuple[str, ...]
):
    options = (checkpoint, "--bank", "none", "--data", "images", *options)
    fails("evaluate", *options, says=says)


def test_a_schedule_of_a_bundle(
    succeeds: Run, checkpoint: Path, bank_file: Path, data: Path, here: Path
):
    model = ("--checkpoint", checkpoint, "--bank", bank_file, "--no-verify")
    succeeds("build", *model, *SCHEDULE, "--targets", 8, "--out", "bundle")
    result = succeeds("evaluate", "bundle", "--data", data, "--check", "--record", "--json")
    eight, fast = rows_of(result)
    options = ("--data", data, "--bank", bank_file, *SCHEDULE, "--json")
    (expected,) = rows_of(succeeds("evaluate", checkpoint, *options))
    assert expected["tocom"] != expected["baseline"]
    expected |= {"model": "bundle", "backend": "onnx"}
    assert without_speed([fast]) == without_speed([expected])
    assert [check["variant"] for check in json.loads(result.stdout)["checks"]] == ["r08", "fast"]
    assert recorded(here / "bundle") == {"r08": eight["accuracy"], "fast": fast["accuracy"]}
    options = ("--data", data, "--variants", "fast", "--json")
    assert without_speed(rows_of(succeeds("evaluate", "bundle", *options))) == without_speed([fast])


def test_another_number_of_classes(fails: Run, checkpoint: Path, photos: Path):
    options = (checkpoint, "--bank", "none", "--data", photos)
    fails("evaluate", *options, says=(f"--data {photos}", "2 classes", checkpoint, "head of 10"))


@pytest.mark.parametrize("held_out", [False, True])
def test_classes_in_another_order(
    fails: Run, checkpoint: Path, bank_file: Path, data: Path, labelled: Labelled, info: ModelInfo,
    held_out: bool,
):  # fmt: skip
    names = list(info.classes)
    names[2], names[5] = names[5], names[2]
    swapped = labelled("swapped", [0] * COUNT, names)
    options = ("--data", swapped)
    if held_out:
        options = ("--data", data, "--scale", "auto", "--held-out", swapped)
    option = "--held-out" if held_out else "--data"
    says = (f"{option} {swapped}", "'class-f'", "'class-c'", checkpoint, "same order")
    fails("evaluate", checkpoint, "--bank", bank_file, *options, says=says)


def test_models_that_take_other_images(
    fails: Run, checkpoint: Path, make_spec: Callable, make_checkpoint: Callable, tmp_path: Path
):
    spec = make_spec(model="tiny", image_size=[48, 48])
    larger = make_checkpoint(tmp_path, spec, metadata=to_metadata(ModelInfo(spec)))
    options = (checkpoint, larger, "--bank", "none", "--data", "images")
    fails("evaluate", *options, says=(checkpoint, larger, "image size", "one at a time"))


def test_a_checkpoint_that_does_not_say_what_it_is(
    fails: Run, make_checkpoint: Callable, spec: VitSpec, here: Path
):
    make_checkpoint(here, spec)
    file = "checkpoint.safetensors"
    says = (f"{file} doesn't say", "finetune", f"build --model NAME --checkpoint {file}")
    fails("evaluate", file, "--bank", "none", "--data", "images", says=says)


def test_an_image_that_cannot_be_read(
    succeeds: Run, checkpoint: Path, tmp_path: Path, image_folder: Callable, info: ModelInfo
):
    images = image_folder(tmp_path / "images", info.classes, each=2)
    broken = images / "class-c" / "1.png"
    broken.write_bytes(b"not an image")
    options = (checkpoint, "--bank", "none", "--data", images, "--targets", "4,8", "--json")
    result = succeeds("evaluate", *options)
    assert [row["images"] for row in rows_of(result)] == [19, 19]
    assert result.stderr.count(f"{broken}: can't be read; skipped") == 1


@pytest.mark.parametrize(
    "options, says",
    [
        ((), ("checkpoint", "bundle", "--out")),
        (("model.safetensors",), ("--data",)),
        (("model.safetensors", "--data", "images"), ("model.safetensors",)),
        (("--out", "none"), ("--out none", "results.json")),
        (("model.safetensors", "--out", "file", "--data", "x"), ("--out file", "no folder")),
        (("--data", "x", "--out", "study"), ("name a checkpoint", "--out alone")),
        (("--check", "--out", "study"), ("name a checkpoint", "--out alone")),
        (("--out", "broken"), ("broken/results.json", "no JSON")),
        (("model.safetensors", "--data", "x", "--scale", "nan"), ("--scale", "nan")),
        (("model.safetensors", "--data", "x", "--scale", "best"), ("--scale", "best")),
        (("model.safetensors", "--data", "x", "--scale", "atuo"), ("'atuo'", "nor 'auto'")),
        (("model.safetensors", "--data", "x", "--targets", "1000001"), ("--targets", "1000001")),
        (("model.safetensors", "--data", "x", "--bank-name", " "), ("--bank-name", "a name")),
        (("model.safetensors", "--data", "x", "--name", ""), ("--name", "a name")),
    ],
    ids=str,
)
def test_bad_usage(fails: Run, here: Path, options: Options, says: Options):
    (here / "file").touch()
    (here / "broken").mkdir()
    (here / "broken" / "results.json").write_text("{")
    Results().save(here / "study" / "results.json")
    fails("evaluate", *options, says=says)


@pytest.mark.parametrize("device", ["nonsense", "mps"])
def test_a_device_that_is_none(fails: Run, checkpoint: Path, data: Path, device: str):
    options = (checkpoint, "--bank", "none", "--data", data, "--device", device)
    fails("evaluate", *options, says=(f"--device {device}", "cuda:N"))


def test_a_model_without_a_bank_of_its_own(fails: Run, checkpoint: Path, data: Path):
    fails("evaluate", checkpoint, "--data", data, says=("--bank", "tiny", "'none'"))


def test_a_bank_of_another_method(fails: Run, checkpoint: Path, bank_file: Path, data: Path):
    options = (checkpoint, "--data", data, "--bank", bank_file, "--method", "evit")
    fails("evaluate", *options, says=(f"--bank {bank_file}", "tome", "evit"))


def test_without_torch(fails: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tocom_export.cli.training_options.is_installed", lambda *_: False)
    options = (checkpoint, "--data", "images")
    fails("evaluate", *options, says=("torch", "pip install 'tocom-export[torch]'"))


FILES = ["accuracy.svg", "results.csv", "results.json", "results.md", "throughput.svg"]


def test_without_matplotlib(
    succeeds: Run, checkpoint: Path, data: Path, here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "tocom_export.study.publish.is_installed", lambda name: name != "matplotlib"
    )
    options = (checkpoint, "--data", data, "--bank", "none", "--targets", "4,8")
    result = succeeds("evaluate", *options, "--out", "study", "--json")
    assert "No plots: matplotlib" in result.stderr
    assert "pip install 'tocom-export[plot]'" in result.stderr
    assert sorted(file.name for file in (here / "study").iterdir()) == FILES[1:4]
    rows = Results.load(here / "study" / "results.json").rows
    assert list(rows) == list(map(parse_row, rows_of(result)))
    page = (here / "study" / "results.md").read_text()
    assert "| 4 → 8 |" in page
    assert "svg" not in page


def test_a_folder_of_results(
    succeeds: Run, checkpoint: Path, plain: Path, bank_file: Path, data: Path, here: Path
):
    model = (plain, checkpoint, "--data", data, "--bank", bank_file, "--targets", "0,4,8")
    first = rows_of(succeeds("evaluate", *model, "--out", "study", "--json"))
    folder = here / "study"
    assert sorted(file.name for file in folder.iterdir()) == FILES
    stored = list(map(parse_row, first))
    assert list(Results.load(folder / "results.json").rows) == stored
    with (folder / "results.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    for name in ("baseline", "accuracy", "accuracy_low", "accuracy_high"):
        assert [float(line[name]) for line in table] == [row[name] for row in first]
    page = (folder / "results.md").read_text()
    assert "![Accuracy against target degree](accuracy.svg)" in page
    assert "![Accuracy against throughput](throughput.svg)" in page
    assert page.count("| 0 → 8 |") == 1
    for picture in ("accuracy.svg", "throughput.svg"):
        assert (folder / picture).read_text().startswith("<?xml")

    both = rows_of(succeeds("evaluate", *model, "--out", "study", "--seed", 1, "--json"))
    assert list(map(parse_row, both[:6])) == stored
    assert [row["backend"] for row in both] == [None] * 6 + ["torch"] * 6
    assert [row["seed"] for row in both] == [0] * 6 + [1] * 6
    assert without_speed(both[6:]) == [{**row, "seed": 1} for row in without_speed(first)]
    assert " ± 0.00 |" in (folder / "results.md").read_text()

    again = rows_of(succeeds("evaluate", *model, "--out", "study", "--seed", 1, "--json"))
    assert len(again) == 12
    assert without_speed(again) == without_speed(both)


@pytest.fixture
def other(checkpoint: Path, here: Path) -> Path:
    """A model of another name and the same degree as ``checkpoint``."""
    return Path(shutil.copy(checkpoint, here / "other.safetensors"))


def test_models_that_would_share_rows(fails: Run, checkpoint: Path, other: Path):
    options = (checkpoint, other, "--bank", "none", "--data", "images")  # not looked at
    says = (f"{other} and {checkpoint} are", "source 4 and seed 0 on images", "--bank-name")
    fails("evaluate", *options, says=says)


def test_models_of_one_name_in_two_folders(fails: Run, checkpoint: Path, here: Path):
    (here / "seed1").mkdir()
    other = Path(shutil.copy(checkpoint, here / "seed1"))
    options = (checkpoint, other, "--bank", "none", "--data", "images")
    fails("evaluate", *options, says=(f"{other} and {checkpoint} are",))


def test_a_model_that_would_take_another_s_rows(
    succeeds: Run, fails: Run, checkpoint: Path, other: Path, data: Path, here: Path
):
    options = ("--data", data, "--bank", "none", "--targets", 4, "--out", "study")
    succeeds("evaluate", checkpoint, *options)
    file = here / "study" / "results.json"
    before = file.read_bytes()
    says = (f"{other} and {checkpoint.name} are", "source 4 and seed 0 on moons")
    fails("evaluate", other, *options, says=says)
    assert file.read_bytes() == before
    for apart in (("--bank-name", "mine"), ("--seed", 1), ("--name", "suns")):
        succeeds("evaluate", other, *options, *apart)
    models = [row.model for row in Results.load(file).rows]
    assert models == [checkpoint.name, *[other.name] * 3]


@pytest.mark.parametrize("known", [True, False])
def test_a_model_takes_its_own_rows(
    succeeds: Run, checkpoint: Path, data: Path, here: Path, known: bool
):
    model = checkpoint.name if known else ""
    old = Row("moons", "tome", 4, 8, 99.9, None, None, 0, model=model)
    Results((old,)).save(here / "study" / "results.json")
    options = ("--data", data, "--bank", "none", "--targets", 8, "--out", "study", "--json")
    (row,) = rows_of(succeeds("evaluate", checkpoint, *options))
    assert row["model"] == checkpoint.name
    assert row["baseline"] != old.baseline


def test_references_of_an_earlier_run(
    succeeds: Run, checkpoint: Path, plain: Path, bank_file: Path, data: Path, predict: Predict
):
    options = ("--data", data, "--bank", bank_file, "--targets", 4, "--out", "study", "--json")
    (row,) = rows_of(succeeds("evaluate", plain, *options))
    assert row["reference"] is None
    row, trained = rows_of(succeeds("evaluate", checkpoint, *options))
    assert row["source"] == 0
    assert row["reference"] == trained["baseline"] == percent(predict(checkpoint, 4, 4), data)


def test_a_page_is_made_again(
    succeeds: Run, checkpoint: Path, bank_file: Path, data: Path, here: Path
):
    options = (checkpoint, "--data", data, "--bank", bank_file, "--out", "study", "--name", "süß|x")
    rows = rows_of(succeeds("evaluate", *options, "--targets", "4,8", "--json"))
    assert {row["dataset"] for row in rows} == {"süß|x"}
    files = {file: file.read_bytes() for file in (here / "study").iterdir()}
    for file in files:
        if file.name != "results.json":
            file.unlink()
    result = succeeds("evaluate", "--out", "study", "--json")
    assert list(map(parse_row, rows_of(result))) == list(map(parse_row, rows))
    assert {file: file.read_bytes() for file in (here / "study").iterdir()} == files


def test_results_without_rows(succeeds: Run, here: Path):
    Results().save(here / "study" / "results.json")
    succeeds("evaluate", "--out", "study")
    assert sorted(file.name for file in (here / "study").iterdir()) == FILES[1:4]


def test_ablations_are_not_drawn(
    succeeds: Run, checkpoint: Path, bank_file: Path, data: Path, here: Path
):
    options = (checkpoint, "--data", data, "--bank", bank_file, "--targets", "12", "--out", "study")
    (row,) = rows_of(succeeds("evaluate", *options, "--bank-name", "shared", "--json"))
    assert row["bank"] == "shared"
    assert sorted(file.name for file in (here / "study").iterdir()) == FILES[1:4]
    assert "svg" not in (here / "study" / "results.md").read_text()
    succeeds("evaluate", *options)
    assert sorted(file.name for file in (here / "study").iterdir()) == FILES
    assert len(Results.load(here / "study" / "results.json").rows) == 2


def test_a_folder_that_cannot_be_written(fails: Run, checkpoint: Path, data: Path, here: Path):
    (here / "file").touch()
    options = (checkpoint, "--bank", "none", "--data", data, "--out", "file/study", "-q")
    fails("evaluate", *options, says=("file/study", "can't be written"))


@pytest.mark.parametrize(
    "place, name",
    [("cifar10/test", "cifar10"), ("a/b/val", "b"), ("flowers", "flowers"), ("test", "test")],
)
def test_the_name_of_a_data_set(
    succeeds: Run, checkpoint: Path, image_folder: Callable, info: ModelInfo, place: str, name: str
):
    image_folder(Path(place), info.classes, each=1)
    options = (checkpoint, "--bank", "none", "--data", place, "--targets", 4, "--json")
    (row,) = rows_of(succeeds("evaluate", *options))
    assert row["dataset"] == name

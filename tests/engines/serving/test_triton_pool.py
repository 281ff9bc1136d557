"""A Triton repository of one model, a pool: its configuration and its files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as pb

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.serving.triton import write_repository
from tocom_export.engines.serving.triton_options import TritonOptions
from tocom_export.engines.serving.triton_requests import Settings
from tocom_export.errors import BundleError, DegreeError, InputError, OutputError, PlanError
from tocom_export.refitting import refit

CLASSES = tuple(f"class {letter}" for letter in "abcdefghij")
POOL = TritonOptions(backend="python")


@pytest.fixture
def bundle(blueprint: Blueprint, tmp_path: Path) -> Bundle:
    """r00 (its source), r08 and r16, a test's own to delete."""
    named = dataclasses.replace(blueprint, classes=CLASSES)
    return write_bundle(named, tmp_path / "bundle")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "models"


def config(bundle: Bundle, out: Path, **options: Any) -> Any:
    (model,) = write_repository(bundle, out, TritonOptions(backend="python", **options), force=True)
    return text_format.Parse(
        (out / model.name / "config.pbtxt").read_text("utf-8"), pb.ModelConfig()
    )


def settings(found: Any) -> Settings:
    """As Triton passes them on."""
    return Settings.read(json_format.MessageToDict(found, preserving_proto_field_name=True))


def test_the_configuration(bundle: Bundle, out: Path):
    found = config(bundle, out)
    assert (found.name, found.backend, found.max_batch_size) == ("small", "python", 32)
    (images,) = found.input
    assert (images.name, images.data_type, list(images.dims)) == (
        "images", pb.TYPE_FP32, [3, 56, 56]
    )  # fmt: skip
    assert [(o.name, o.data_type, list(o.dims)) for o in found.output] == [
        ("logits", pb.TYPE_FP32, [10]), ("variant", pb.TYPE_STRING, [1]),
        ("source", pb.TYPE_INT32, [1]), ("scale", pb.TYPE_FP32, [1]),
    ]  # fmt: skip
    assert [o.label_filename for o in found.output] == ["labels.txt", "", "", ""]
    (group,) = found.instance_group
    assert (group.count, group.kind) == (1, pb.ModelInstanceGroup.KIND_CPU)
    assert list(found.dynamic_batching.preferred_batch_size) == []
    assert found.dynamic_batching.max_queue_delay_microseconds == 1000
    assert list(found.model_warmup) == []
    assert found.parameters["size"].string_value == "56,56"
    assert settings(found) == Settings(capacity=32, delay=0.001)


def test_options(bundle: Bundle, out: Path):
    found = config(
        bundle, out, name="cats", runtime="openvino", threads=2, slo_ms=12.5, control=True,
        max_batch=4, max_delay_ms=0,
    )  # fmt: skip
    assert (found.name, found.max_batch_size) == ("cats", 4)
    assert settings(found) == Settings("openvino", None, 2, 0.0125, True, 4, 0.0)
    assert settings(found).options == {"backend": "openvino", "threads": 2}


@pytest.mark.parametrize(
    "runtime, device", [(None, "cuda"), ("onnx", "cuda"), ("openvino", "GPU"), ("tensorrt", None)]
)
def test_on_a_gpu(planned, bundle: Bundle, out: Path, runtime: Any, device: str | None):
    given = planned() if runtime == "tensorrt" else bundle
    found = config(given, out, runtime=runtime, device="gpu")
    assert settings(found).device == device
    # Triton would start a process on each GPU.
    assert found.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU


def test_the_files(bundle: Bundle, out: Path):
    (model,) = write_repository(bundle, out, POOL)
    assert (model.name, model.variant, model.max_batch) == ("small", None, 32)
    inside = {"manifest.json", *bundle.files}
    wanted = {f"small/1/bundle/{name}" for name in inside}
    wanted |= {"small/1/model.py", "small/config.pbtxt", "small/labels.txt"}
    assert {*model.files} == wanted
    assert model.files == {name: (out / name).stat().st_size for name in wanted}
    copy = Bundle.open(out / "small/1/bundle", hashes=True)
    assert copy.to_json() == bundle.to_json()


def test_the_program_gives_triton_its_model(bundle: Bundle, out: Path):
    write_repository(bundle, out, POOL)
    names: dict[str, Any] = {}
    exec((out / "small/1/model.py").read_text("utf-8"), names)
    assert {"initialize", "execute", "finalize"} <= {*dir(names["TritonPythonModel"])}


def test_some_variants(bundle: Bundle, out: Path, make_images):
    accuracy = {"r00": 90.0, "r08": 89.0, "r16": 80.0}
    measured = dataclasses.replace(bundle, accuracy=accuracy, refitted=("r08", "r16"))
    write_repository(measured, out, POOL, [16, "r00"])
    copy = Bundle.open(out / "small/1/bundle", hashes=True)
    assert {*copy.variants} == {"r00", "r16"}
    assert {*copy.files} == {"weights.safetensors", "r00.onnx", "r16.onnx", "r16.safetensors"}
    assert (copy.accuracy, copy.refitted) == ({"r00": 90.0, "r16": 80.0}, ("r16",))
    images = make_images(bundle.spec)
    shutil.rmtree(bundle.path)
    with EnginePool(copy.path, threads=1) as pool:
        assert pool.variants == ("r00", "r16")
        assert np.isfinite(pool.run(images)).all()


@pytest.fixture
def planned(nvidia: Any, bundle: Bundle, write_plan: Callable[..., Path]) -> Callable[..., Bundle]:
    """The bundle with a plan of r08, by the pretended library."""

    def call(**options: Any) -> Bundle:
        write_plan(bundle, "r08", **options)
        return dataclasses.replace(bundle, plans=("r08",))

    return call


def test_plans(planned, out: Path):
    bundle = planned(batch=(1, 4, 16))
    (model,) = write_repository(bundle, out, TritonOptions(backend="python", runtime="tensorrt"))
    assert model.max_batch == 16
    copy = Bundle.open(out / "small/1/bundle", hashes=True)
    assert ({*copy.variants}, copy.plans) == ({"r08"}, ("r08",))
    for name in ("r08.plan", "r08.plan.json"):
        assert (copy.path / name).read_bytes() == (bundle.path / name).read_bytes()
    write_repository(bundle, out, POOL, force=True)  # what lies there is known
    copy = Bundle.open(out / "small/1/bundle", hashes=True)
    assert ({*copy.variants}, copy.plans) == ({"r00", "r08", "r16"}, ())
    assert not list(copy.path.glob("*.plan*"))


@pytest.mark.parametrize(
    "built, asked, says",
    [
        ({"batch": (2, 4, 8)}, {}, r"r08\.plan takes 2 images or more, .*--batch 1,4,8"),
        ({"library": "tensorrt-rtx"}, {}, r"r08\.plan is of tensorrt-rtx, `runtime` is tensorrt"),
    ],
    ids=str,
)
def test_plans_that_can_t_run(planned, out: Path, built: Any, asked: Any, says: str):
    with pytest.raises(PlanError, match=says):
        write_repository(
            planned(**built), out, TritonOptions(backend="python", runtime="tensorrt", **asked)
        )
    assert not out.exists()


def test_a_larger_batch_than_the_plans(planned, out: Path):
    options = TritonOptions(backend="python", runtime="tensorrt", max_batch=33)
    with pytest.raises(InputError, match="`max_batch` 33: the plans take 32 images at most"):
        write_repository(planned(), out, options)


def test_without_plans(bundle: Bundle, out: Path):
    with pytest.raises(DegreeError, match="no plan for r00"):
        write_repository(bundle, out, TritonOptions(backend="python", runtime="tensorrt"))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"runtime": "onnx"}, "`runtime` is for `backend` python"),
        ({"slo_ms": 5.0}, "`slo_ms` is for `backend` python"),
        ({"control": True}, "`control` is for `backend` python"),
        ({"backend": "python", "instances": 2}, "`instances` 2: .*weights of its own"),
        ({"backend": "python", "slo_ms": 0.0}, "`slo_ms` 0: a positive number"),
        ({"backend": "python", "slo_ms": float("nan")}, "`slo_ms` nan"),
    ],
    ids=str,
)
def test_options_that_can_t_be(options: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        TritonOptions(**options)


def test_it_replaces_what_it_wrote(bundle: Bundle, out: Path):
    write_repository(bundle, out, POOL)
    (out / "small/1/__pycache__").mkdir()  # Triton's Python leaves it behind
    write_repository(bundle, out, TritonOptions(), [8], force=True)
    assert [folder.name for folder in out.iterdir()] == ["small_r08"]
    write_repository(bundle, out, POOL, force=True)
    assert [folder.name for folder in out.iterdir()] == ["small"]


def test_it_replaces_what_was_refitted_there(bundle: Bundle, out: Path, make_bank, tmp_path: Path):
    write_repository(bundle, out, POOL)
    bank = tmp_path / "bank.safetensors"
    make_bank(bundle.spec).save(bank)
    refit(out / "small/1/bundle", bank=bank, scale=0.5)
    assert Bundle.open(out / "small/1/bundle", hashes=True).variants["r08"].scale == 0.5
    write_repository(bundle, out, POOL, force=True)


@pytest.mark.parametrize(
    "file", ["small/notes.txt", "small/1/mine.py", "small/1/bundle/notes.txt", "small/1/model.py"]
)
def test_other_files_are_not_removed(bundle: Bundle, out: Path, file: str):
    write_repository(bundle, out, POOL)
    (out / file).write_text("mine")
    with pytest.raises(OutputError, match=r"models holds other files .*remove it yourself"):
        write_repository(bundle, out, POOL, force=True)
    assert (out / file).read_text() == "mine"


@pytest.mark.parametrize("name", ["r08.onnx", "weights.safetensors", "r08.safetensors"])
def test_a_file_that_is_not_what_the_manifest_says(bundle: Bundle, out: Path, name: str):
    file = bundle.path / name
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(BundleError, match="is not what its bundle's manifest said"):
        write_repository(bundle, out, POOL)
    assert not out.exists()

"""A Triton model repository: its configuration, by Triton's own messages, and its files."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.openvino.library import open_core
from tocom_export.engines.serving.triton import write_repository
from tocom_export.engines.serving.triton_options import TritonOptions
from tocom_export.errors import (
    BundleError,
    DegreeError,
    InputError,
    MissingPackageError,
    OutputError,
    PlanError,
)
from tocom_export.model.preprocess import Preprocess

CLASSES = tuple(f"class {letter}" for letter in "abcdefghij")
ONNX = TritonOptions()


@pytest.fixture
def bundle(blueprint: Blueprint, tmp_path: Path) -> Bundle:
    """r00 (its source), r08 and r16, a test's own to delete."""
    known = Preprocess((0.5, 0.25, 0.125), (0.2, 0.3, 0.4), 0.9, "bilinear")
    named = dataclasses.replace(blueprint, classes=CLASSES, preprocess=known)
    return write_bundle(named, tmp_path / "bundle")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
def planned(nvidia: Any, bundle: Bundle, write_plan: Callable[..., Path]) -> Callable[..., Bundle]:
    """The bundle with a plan of r08, by the pretended library."""

    def call(**options: Any) -> Bundle:
        write_plan(bundle, "r08", **options)
        return dataclasses.replace(bundle, plans=("r08",))

    return call


def config_of(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), pb.ModelConfig())


def config(bundle: Bundle, out: Path, variant: str | int = 8, **options: Any) -> Any:
    (model,) = write_repository(bundle, out, TritonOptions(**options), [variant], force=True)
    return config_of(out / model.name)


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_the_configuration(bundle: Bundle, out: Path):
    found = config(bundle, out)
    assert (found.name, found.backend, found.max_batch_size) == ("small_r08", "onnxruntime", 32)
    (images,), (logits,) = found.input, found.output
    assert (images.name, images.data_type, list(images.dims)) == (
        "images",
        pb.TYPE_FP32,
        [3, 56, 56],
    )
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", pb.TYPE_FP32, [10])
    assert logits.label_filename == "labels.txt"
    (group,) = found.instance_group
    assert (group.count, group.kind) == (1, pb.ModelInstanceGroup.KIND_CPU)
    assert list(found.dynamic_batching.preferred_batch_size) == [8, 32]
    assert found.dynamic_batching.max_queue_delay_microseconds == 1000
    assert not found.HasField("optimization")
    assert {key: value.string_value for key, value in found.parameters.items()} == {
        "mean": "0.5,0.25,0.125",
        "std": "0.2,0.3,0.4",
        "size": "56,56",
        "crop_pct": "0.9",
        "interpolation": "bilinear",
        "crop_mode": "center",
    }


def test_warm_ups(bundle: Bundle, out: Path):
    one, most = config(bundle, out).model_warmup
    assert [(w.name, w.batch_size) for w in (one, most)] == [("batch_1", 1), ("batch_32", 32)]
    for warmup in (one, most):
        (name,) = warmup.inputs
        images = warmup.inputs[name]
        assert (name, images.data_type, list(images.dims)) == ("images", pb.TYPE_FP32, [3, 56, 56])
        assert images.zero_data


def test_the_configuration_on_a_gpu(bundle: Bundle, out: Path):
    found = config(bundle, out, device="gpu")
    assert found.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    (cuda,) = found.optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, dict(cuda.parameters)) == ("cuda", {"use_tf32": "0"})


@pytest.mark.parametrize(("device", "target"), [("cpu", "CPU"), ("gpu", "GPU")])
def test_the_configuration_for_openvino(bundle: Bundle, out: Path, device: Any, target: str):
    threads = 2 if device == "cpu" else None
    found = config(bundle, out, backend="openvino", device=device, threads=threads, instances=3)
    assert (found.backend, found.default_model_filename) == ("openvino", "model.onnx")
    # Intel's GPU is none of those that Triton counts.
    assert found.instance_group[0].kind == found.instance_group[0].KIND_CPU
    values = {key: value.string_value for key, value in found.parameters.items()}
    wanted = {"NUM_STREAMS": "3", "PERFORMANCE_HINT": "THROUGHPUT", "TARGET_DEVICE": target}
    assert wanted.items() <= values.items()
    assert values.get("INFERENCE_NUM_THREADS") == {"CPU": "2", "GPU": None}[target]
    assert "intra_op_thread_count" not in values
    assert not found.HasField("optimization")


def test_openvino_opens_the_graph_in_its_place(bundle: Bundle, out: Path, make_images):
    pytest.importorskip("openvino")
    write_repository(bundle, out, TritonOptions(backend="openvino"), ["r08"])
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    model = open_core().compile_model(str(out / "small_r08/1/model.onnx"), "CPU", config)
    images = make_images(bundle.spec)
    wanted = bundle.engine("r08").run(images)
    np.testing.assert_allclose(model(images)[0], wanted, atol=1e-4)


def test_options(bundle: Bundle, out: Path):
    found = config(bundle, out, name="cats-2", instances=3, max_delay_ms=0.5, threads=2)
    assert found.name == "cats-2_r08"
    assert found.instance_group[0].count == 3
    assert found.dynamic_batching.max_queue_delay_microseconds == 500
    assert found.parameters["intra_op_thread_count"].string_value == "2"


@pytest.mark.parametrize(
    "largest, preferred, warmed",
    [(1, [1], [1]), (2, [1, 2], [1, 2]), (64, [16, 64], [1, 64])],
)
def test_batches(bundle: Bundle, out: Path, largest: int, preferred: list[int], warmed: list[int]):
    found = config(bundle, out, max_batch=largest)
    assert found.max_batch_size == largest
    assert list(found.dynamic_batching.preferred_batch_size) == preferred
    assert [warmup.batch_size for warmup in found.model_warmup] == warmed


def test_the_files(bundle: Bundle, out: Path):
    models = write_repository(bundle, out, ONNX)
    assert [(m.name, m.variant, m.max_batch) for m in models] == [
        ("small_r00", "r00", 32), ("small_r08", "r08", 32), ("small_r16", "r16", 32)
    ]  # fmt: skip
    own = {"r00": [], "r08": ["r08.safetensors"], "r16": ["r16.safetensors"]}
    for model in models:
        inside = ["model.onnx", *own[model.variant], "weights.safetensors"]
        wanted = [*(f"1/{name}" for name in inside), "config.pbtxt", "labels.txt"]
        assert tree(out / model.name) == wanted
        assert model.files == {
            f"{model.name}/{name}": (out / model.name / name).stat().st_size for name in wanted
        }
    assert [file for model in models for file in model.files] == tree(out)


def test_the_same_logits_and_without_the_bundle_too(
    bundle: Bundle, out: Path, make_images, run_graph
):
    images = make_images(bundle.spec)
    wanted = {v: OnnxEngine(bundle, v, threads=1).run(images) for v in bundle.variants}
    models = write_repository(bundle, out, ONNX)
    shutil.rmtree(bundle.path)
    for model in models:
        logits = run_graph(out / model.name / "1" / "model.onnx", images)
        np.testing.assert_array_equal(logits, wanted[model.variant])
    assert not np.allclose(wanted["r00"], wanted["r08"])


def test_onnx_loads_them(bundle: Bundle, out: Path):
    """It refuses weights that have several links."""
    write_repository(bundle, out, ONNX)
    for place in (out / "small_r08" / "1" / "model.onnx", bundle.graph(8)):
        onnx.checker.check_model(place)
        onnx.load(place)


def test_a_bundle_of_symbolic_links(bundle: Bundle, out: Path, make_images, run_graph):
    """As downloads in a cache are."""
    for name in ("weights.safetensors", "r08.onnx"):
        (bundle.path / name).rename(bundle.path.parent / name)
        (bundle.path / name).symlink_to(Path("..") / name)
    write_repository(bundle, out, ONNX, [8])
    weights = out / "small_r08" / "1" / "weights.safetensors"
    assert weights.is_file() and not weights.is_symlink()
    run_graph(weights.with_name("model.onnx"), make_images(bundle.spec))


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_follow_the_umask(bundle: Bundle, out: Path):
    before = os.umask(0o027)
    try:
        write_repository(bundle, out, ONNX, [8])
    finally:
        os.umask(before)
    modes = {
        name: stat.S_IMODE((out / name).stat().st_mode)
        for name in ("", "small_r08", "small_r08/1", "small_r08/config.pbtxt")
    }
    assert list(modes.values()) == [0o750, 0o750, 0o750, 0o640]


def test_labels(blueprint: Blueprint, tmp_path: Path, out: Path):
    names = ("tench, Tinca tinca", "a\nb", "größer", *CLASSES[3:])
    named = write_bundle(dataclasses.replace(blueprint, classes=names), tmp_path / "named")
    write_repository(named, out, ONNX, [8])
    lines = (out / "small_r08" / "labels.txt").read_bytes().decode("utf-8").split("\n")
    assert lines == ["tench, Tinca tinca", "a b", "größer", *CLASSES[3:], ""]


def test_without_classes(fresh: Bundle, out: Path):
    assert config(fresh, out).output[0].label_filename == ""
    assert "labels.txt" not in {file.name for file in out.rglob("*")}


def test_a_model_without_a_head(make_blueprint, make_spec, tmp_path: Path, out: Path):
    features = write_bundle(
        make_blueprint(tmp_path, make_spec(classes=0), targets=(8,)), tmp_path / "b"
    )
    assert list(config(features, out).output[0].dims) == [64]


def test_a_name_with_other_characters(blueprint: Blueprint, revise, tmp_path: Path, out: Path):
    spec = dataclasses.replace(blueprint.weights.spec, model="vit_tiny.augreg+x-1")
    named = write_bundle(revise(blueprint, spec=spec), tmp_path / "named")
    assert config(named, out).name == "vit_tiny_augreg_x-1_r08"


@pytest.mark.parametrize(
    "options, says",
    [
        ({"name": "a/b"}, "`name` 'a/b': letters, digits"),
        ({"name": ""}, "`name` ''"),
        ({"name": "größe"}, "`name` 'größe'"),
        ({"backend": "tensorrt", "device": "cpu"}, "`device` cpu: TensorRT plans run on a GPU"),
        ({"backend": "tensorrt", "threads": 2}, "`threads` is for graphs on a CPU"),
        ({"device": "gpu", "threads": 2}, "`threads` is for a CPU; leave it out"),
        ({"backend": "openvino", "device": "gpu", "threads": 2}, "`threads` is for a CPU"),
        ({"max_delay_ms": -1}, "`max_delay_ms` -1: it is 0 to 60000"),
        ({"max_delay_ms": float("nan")}, "`max_delay_ms` nan"),
    ],
    ids=str,
)
def test_options_that_can_t_be(options: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        TritonOptions(**options)


def test_bfloat16_is_for_gpus(blueprint: Blueprint, revise, tmp_path: Path, out: Path):
    bf16 = write_bundle(revise(blueprint, precision="bf16"), tmp_path / "bf16")
    with pytest.raises(InputError, match=r"bf16 is bf16, which ONNX Runtime .*`device` gpu"):
        write_repository(bf16, out, ONNX)
    assert not out.exists()
    assert config(bf16, out, device="gpu").input[0].data_type == pb.TYPE_FP32


@pytest.mark.parametrize("other", ["fast", "r12"])
def test_a_variant_that_the_bundle_lacks(bundle: Bundle, out: Path, other: str):
    with pytest.raises(DegreeError, match=f"no variant {other}; it has r00, r08, r16"):
        write_repository(bundle, out, ONNX, ["r08", other])
    assert not out.exists()


@pytest.mark.parametrize("force", [True, False])
def test_what_is_there_already(bundle: Bundle, out: Path, force: bool):
    write_repository(bundle, out, ONNX)
    before = tree(out)
    if force:
        write_repository(bundle, out, TritonOptions(name="other"), [8], force=True)
        assert [folder.name for folder in out.iterdir()] == ["other_r08"]
    else:
        with pytest.raises(OutputError, match="models exists; add `force`"):
            write_repository(bundle, out, ONNX, [8])
        assert tree(out) == before
    assert sorted(p.name for p in out.parent.iterdir()) == ["bundle", "models"]


def test_an_empty_folder_is_replaced(bundle: Bundle, out: Path):
    out.mkdir()
    write_repository(bundle, out, ONNX, [8], force=True)
    assert (out / "small_r08").is_dir()


@pytest.mark.parametrize(
    "file",
    [
        "notes.txt", "small_r08/notes.txt", "small_r08/1/model.py", "small_r08/1/mine.safetensors",
        "small_r08/2/model.onnx", "other/config.pbtxt",
    ],
)  # fmt: skip
def test_other_files_are_not_removed(bundle: Bundle, out: Path, file: str):
    write_repository(bundle, out, ONNX)
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("mine")
    before = tree(out)
    with pytest.raises(OutputError, match=r"models holds other files .*remove it yourself"):
        write_repository(bundle, out, ONNX, force=True)
    assert tree(out) == before


def test_another_s_configuration_is_not_removed(bundle: Bundle, out: Path):
    write_repository(bundle, out, ONNX)
    (out / "small_r08" / "config.pbtxt").write_text('backend: "onnxruntime"\n')
    with pytest.raises(OutputError, match="holds other files"):
        write_repository(bundle, out, ONNX, force=True)


def test_a_bundle_is_not_replaced(bundle: Bundle):
    with pytest.raises(OutputError, match="bundle holds other files"):
        write_repository(bundle, bundle.path, ONNX, force=True)
    Bundle.open(bundle.path, hashes=True)


def test_a_file_in_the_way(bundle: Bundle, out: Path):
    out.touch()
    with pytest.raises(OutputError, match="models is a file; a model repository is a folder"):
        write_repository(bundle, out, ONNX, force=True)


def test_an_interrupt_leaves_the_old_repository(bundle: Bundle, out: Path):
    write_repository(bundle, out, ONNX, [8])
    before = tree(out)

    def interrupt(name: str) -> None:
        if name == "small_r08":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_repository(bundle, out, ONNX, force=True, progress=interrupt)
    assert tree(out) == before
    assert sorted(p.name for p in out.parent.iterdir()) == ["bundle", "models"]


@pytest.mark.parametrize("missing", ["tritonclient.grpc", "grpc"])
def test_without_tritonclient(bundle: Bundle, out: Path, monkeypatch, missing: str):
    """Not at all, or without the parts that its extra [grpc] brings."""
    monkeypatch.delitem(sys.modules, "tritonclient.grpc")
    monkeypatch.setitem(sys.modules, missing, None)
    says = r"tritonclient is not installed; pip install 'tocom-export\[triton\]'"
    with pytest.raises(MissingPackageError, match=says):
        write_repository(bundle, out, ONNX, [12])  # said before the bundle is looked into
    assert not out.exists()


def test_a_plan(planned, out: Path):
    bundle = planned(batch=(1, 4, 16))
    (model,) = write_repository(bundle, out, TritonOptions(backend="tensorrt"))
    assert tree(out) == [
        "small_r08/1/model.plan", "small_r08/config.pbtxt", "small_r08/labels.txt"
    ]  # fmt: skip
    copy, original = out / "small_r08" / "1" / "model.plan", bundle.path / "r08.plan"
    assert copy.read_bytes() == original.read_bytes()
    found = config_of(out / model.name)
    assert (found.backend, found.max_batch_size) == ("tensorrt", 16)
    assert found.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert list(found.dynamic_batching.preferred_batch_size) == [4, 16]
    assert [warmup.batch_size for warmup in found.model_warmup] == [1, 16]
    assert found.parameters["mean"].string_value == "0.5,0.25,0.125"
    assert not found.HasField("optimization")


def test_a_smaller_batch_than_the_plan_s(planned, out: Path):
    found = config(planned(), out, backend="tensorrt", max_batch=4)
    assert found.max_batch_size == 4
    assert list(found.dynamic_batching.preferred_batch_size) == [4]


@pytest.mark.parametrize(
    "built, says",
    [
        (
            {"library": "tensorrt-rtx"},
            r"r08\.plan is of tensorrt-rtx; Triton runs plans of tensorrt",
        ),
        ({"strip": True}, r"r08\.plan is stripped .*tocom-export refit .*r08\.plan puts them in"),
        ({"refit": "identical"}, r"r08\.plan takes its weights from its .*--refit none, qkv"),
        ({"batch": (2, 4, 8)}, r"r08\.plan takes 2 images or more, .*--batch 1,4,8"),
    ],
    ids=str,
)
def test_plans_that_can_t_run_there(planned, out: Path, built: dict[str, Any], says: str):
    with pytest.raises(PlanError, match=says):
        write_repository(planned(**built), out, TritonOptions(backend="tensorrt"))
    assert not out.exists()


def test_a_larger_batch_than_the_plan_s(planned, out: Path):
    options = TritonOptions(backend="tensorrt", max_batch=33)
    with pytest.raises(InputError, match=r"`max_batch` 33: .*r08\.plan takes 32 images at most"):
        write_repository(planned(), out, options)


@pytest.mark.parametrize("name", ["r08.onnx", "weights.safetensors", "r08.safetensors"])
def test_a_file_that_is_not_what_the_manifest_says(bundle: Bundle, out: Path, name: str):
    """Of the right size: that is all that opening a bundle looks at."""
    file = bundle.path / name
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    says = rf"{name} is not what its bundle's manifest said .*build it again"
    with pytest.raises(BundleError, match=says):
        write_repository(bundle, out, ONNX, [8])
    assert not out.exists()
    file.unlink()
    with pytest.raises(BundleError, match=f"{name}: can't be read: No such file"):
        write_repository(bundle, out, ONNX, [8])
    assert not out.exists()


def test_a_damaged_plan(planned, out: Path):
    bundle = planned()
    plan = bundle.path / "r08.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(PlanError, match=r"r08\.plan is damaged"):
        write_repository(bundle, out, TritonOptions(backend="tensorrt"))


def test_a_variant_without_a_plan(planned, out: Path):
    bundle, options = planned(), TritonOptions(backend="tensorrt")
    with pytest.raises(DegreeError, match=r"no plan for r16 \(plans: r08\)"):
        write_repository(bundle, out, options, [8, 16])
    with pytest.raises(DegreeError, match=r"no plan for r00 \(plans: none\)"):
        write_repository(dataclasses.replace(bundle, plans=()), out, options)


def test_a_variant_with_a_name_and_a_degree_per_layer(
    make_blueprint, tmp_path: Path, out: Path, make_images, run_graph
):
    schedules = {"fast": (20, 11, 4, 0), "very_fast-2": (24, 8, 4, 2)}
    bundle = write_bundle(
        make_blueprint(tmp_path, targets=(0,), schedules=schedules), tmp_path / "named"
    )
    models = write_repository(bundle, out, ONNX, ["fast", "very_fast-2"])
    assert [(m.name, m.variant) for m in models] == [
        ("small_fast", "fast"), ("small_very_fast-2", "very_fast-2")
    ]  # fmt: skip
    images = make_images(bundle.spec)
    for model in models:
        assert f"{model.name}/1/{model.variant}.safetensors" in model.files
        logits = run_graph(out / model.name / "1" / "model.onnx", images)
        np.testing.assert_array_equal(logits, bundle.engine(model.variant, threads=1).run(images))
    assert config_of(out / "small_fast").name == "small_fast"
    write_repository(bundle, out, TritonOptions(name="x"), force=True)
    names = [folder.name for folder in sorted(out.iterdir())]
    assert names == ["x_fast", "x_r00", "x_very_fast-2"]

"""Other weights for a whole bundle, in one step, and what is checked before."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from tocom_export.bundle.manifest import WEIGHTS
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.serving.pool import EnginePool
from tocom_export.errors import (
    BankError,
    BundleError,
    BusyError,
    CheckFailed,
    CheckpointError,
    InputError,
)
from tocom_export.exporting import export
from tocom_export.graph.precision import Precision
from tocom_export.graph.quantising import quantized_layers
from tocom_export.io.locking import hold
from tocom_export.model.catalogue import REFERENCE_BANKS, REFERENCE_CHECKPOINT
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.refitting import refit

Files = dict[str, bytes]


def read(bundle: Bundle) -> Files:
    return {file.name: file.read_bytes() for file in bundle.path.iterdir()}


@pytest.fixture
def bank(blueprint: Blueprint, tmp_path: Path) -> Path:
    file = tmp_path / "bank.safetensors"
    assert blueprint.weights.bank is not None
    blueprint.weights.bank.save(file)
    return file


@pytest.fixture
def save_other(blueprint: Blueprint, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of the same model with all weights larger by a tenth."""

    def save(**info: Any) -> Path:
        weights = blueprint.weights.checkpoint.tensors
        tensors = {name: np.array(w) * np.float32(1.1) for name, w in weights.items()}
        file = tmp_path / "other.safetensors"
        known = ModelInfo(blueprint.weights.spec, info.pop("source", None), **info)
        save_file(tensors, file, to_metadata(known))
        return file

    return save


def test_all_weights_of_all_variants(
    fresh: Bundle, blueprint: Blueprint, revise: Callable[..., Blueprint], bank: Path,
    save_other: Callable[..., Path], tmp_path: Path, make_images: Any,
):  # fmt: skip
    """What the variants share, and what they don't: the engines are those of a new build."""
    other = save_other()
    done = refit(fresh.path, checkpoint=other, bank=bank, scale=0.05)
    changes = {"checkpoint": Checkpoint.open(other), "scale": 0.05}
    built = write_bundle(revise(blueprint, **changes), tmp_path / "built")
    opened = Bundle.open(fresh.path, hashes=True)
    assert opened == done.bundle
    assert opened.refitted == tuple(fresh.variants)
    assert opened.variants == built.variants
    assert [*done.comparisons] == [*fresh.variants]
    assert all(found.passed for found in done.comparisons.values())
    shared = load_file(fresh.path / WEIGHTS)
    assert all(np.array_equal(shared[name], w) for name, w in load_file(other).items())
    images = make_images(fresh.spec, 3)
    for name in fresh.variants:
        wanted = OnnxEngine(built, name, threads=1).run(images)
        np.testing.assert_array_equal(OnnxEngine(opened, name, threads=1).run(images), wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_variant_that_needs_weights_of_its_own(
    make_blueprint: Callable[..., Blueprint], revise: Callable[..., Blueprint], tmp_path: Path,
    bank: Path, save_other: Callable[..., Path], make_images: Any, precision: Precision,
):  # fmt: skip
    """r00 has none at source 0; it gets a file, and a graph that is a new build's."""
    blueprint = make_blueprint(tmp_path, precision=precision)
    steps = dict.fromkeys(quantized_layers(blueprint.weights.spec), 0.05)
    options: dict[str, Any] = {"calibrate": lambda *_: steps} if precision == "int8" else {}
    bundle = write_bundle(blueprint, tmp_path / "bundle", **options)
    assert "r00.safetensors" not in bundle.files
    other = save_other(source=4)
    done = refit(bundle.path, checkpoint=other, bank=bank, verify=False)
    changes = {"checkpoint": Checkpoint.open(other), "source": 4}
    built = write_bundle(revise(blueprint, **changes), tmp_path / "built", **options)
    opened = Bundle.open(bundle.path, hashes=True)
    assert opened == done.bundle
    assert opened.variants == built.variants
    assert opened.weight_files("r00") == [bundle.path / WEIGHTS, bundle.path / "r00.safetensors"]
    for name in ("r00.safetensors", WEIGHTS):
        assert (bundle.path / name).read_bytes() == (built.path / name).read_bytes()
    images = make_images(bundle.spec, 2)
    for name in opened.variants:
        wanted = OnnxEngine(built, name, threads=1).run(images)
        np.testing.assert_array_equal(OnnxEngine(opened, name, threads=1).run(images), wanted)
    with EnginePool(bundle.path, backend="onnx", threads=1) as pool:
        np.testing.assert_array_equal(
            pool.run(images, 0), OnnxEngine(built, "r00", threads=1).run(images)
        )


def test_one_variant_gets_weights_of_its_own(
    fresh: Bundle, blueprint: Blueprint, revise: Callable[..., Blueprint], bank: Path,
    tmp_path: Path, make_images: Any,
):  # fmt: skip
    """Where nobody has said what the weights were trained at; and loses none afterwards."""
    before = read(fresh)
    refit(fresh.path, [0], bank=bank, source=8)
    after = read(fresh)
    assert {name for name in after if after[name] != before.get(name)} == {
        "manifest.json", "r00.onnx", "r00.safetensors",
    }  # fmt: skip
    built = write_bundle(revise(blueprint, source=8), tmp_path / "built")
    images = make_images(fresh.spec, 2)
    wanted = OnnxEngine(built, "r00", threads=1).run(images)
    opened = Bundle.open(fresh.path, hashes=True)
    np.testing.assert_array_equal(OnnxEngine(opened, "r00", threads=1).run(images), wanted)
    refit(fresh.path, [0], bank=bank, source=0)
    wanted = OnnxEngine(fresh, "r00", threads=1, compensated=False).run(images)
    opened = Bundle.open(fresh.path, hashes=True)
    np.testing.assert_array_equal(OnnxEngine(opened, "r00", threads=1).run(images), wanted)


def test_a_source_that_nobody_has_said(fresh: Bundle, bank: Path):
    """It was taken for 0, and is corrected in all that the bundle says; then it is known."""
    assert Checkpoint.open(fresh.path / WEIGHTS).info.source is None
    refit(fresh.path, bank=bank, source=8)
    opened = Bundle.open(fresh.path, hashes=True)
    assert {variant.source for variant in opened.variants.values()} == {8}
    assert Checkpoint.open(fresh.path / WEIGHTS).info.source == 8
    says = r"`source` 4, but .*weights.safetensors was trained at degree 8 by its metadata; leave"
    with pytest.raises(CheckpointError, match=says):
        refit(fresh.path, bank=bank, source=4)
    refit(fresh.path, bank=bank, source=8, scale=0.2)


@pytest.mark.parametrize("variants", [None, [8]])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_source_that_the_bundle_s_own_weights_contradict(
    tmp_path: Path, precision: Precision, variants: list[int] | None
):
    """As a build of them would; of rounded ones, the file that they are of."""
    bundle = export(out=tmp_path / "out", targets=(0, 8), precision=precision, verify=False)
    before = read(bundle)
    says = r"`source` 4, but .*\.safetensors was trained at degree 0 by its metadata"
    with pytest.raises(CheckpointError, match=says):
        refit(bundle.path, variants, source=4, verify=False)
    with pytest.raises(CheckpointError, match=says):
        export(checkpoint=bundle.path / WEIGHTS, source=4, out=tmp_path / "new", verify=False)
    assert read(bundle) == before


def test_one_variant_can_t_get_what_others_share(
    fresh: Bundle, bank: Path, save_other: Callable[..., Path]
):
    before = read(fresh)
    with pytest.raises(BundleError, match=r"whose engines all read it from .*; refit the bundle"):
        refit(fresh.path, [8], checkpoint=save_other(), bank=bank)
    assert read(fresh) == before


def test_what_the_checkpoint_says_of_itself_comes_along(
    fresh: Bundle, bank: Path, save_other: Callable[..., Path], make_images: Any
):
    """Into the manifest, into the weights and into the graphs, whose offsets move."""
    names = tuple(f"class {number}" for number in range(10))
    statistics = Preprocess((0.5,) * 3, (0.25,) * 3, 0.9, "bilinear")
    variants = ["r08", "r16"]
    file = save_other(source=4, classes=names, preprocess=statistics)
    refit(fresh.path, checkpoint=file, bank=bank, scale=0.3)
    opened = Bundle.open(fresh.path, hashes=True)
    assert (opened.classes, opened.preprocess) == (names, statistics)
    info = Checkpoint.open(fresh.path / WEIGHTS).info
    assert (info.source, info.classes, info.preprocess) == (4, names, statistics)
    graph = onnx.load(str(opened.graph("r08")), load_external_data=False)
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert (facts["scale"], facts["image_mean"]) == ("0.3", "[0.5, 0.5, 0.5]")
    images = make_images(fresh.spec, 2)
    for name in variants:
        wanted = OnnxEngine(opened, name, threads=1, weights=opened.tensors(name)).run(images)
        np.testing.assert_array_equal(OnnxEngine(opened, name, threads=1).run(images), wanted)


def test_other_files_stay(fresh: Bundle, bank: Path, tmp_path: Path):
    """Whatever somebody has put beside the bundle's own, links and folders included."""
    (tmp_path / "outside").write_text("outside")
    (tmp_path / "outside").chmod(0o444)
    (fresh.path / "LABELS.md").write_text("labels")
    (fresh.path / "sub").mkdir()
    (fresh.path / "sub" / "config").write_text("config")
    (fresh.path / "link").symlink_to(tmp_path / "outside")
    refit(fresh.path, ["r08"], bank=bank, scale=0.2)
    assert (fresh.path / "LABELS.md").read_text() == "labels"
    assert (fresh.path / "sub" / "config").read_text() == "config"
    assert (fresh.path / "link").readlink() == tmp_path / "outside"
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o444


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_stay(fresh: Bundle, bank: Path):
    for file in (fresh.path, *fresh.path.iterdir()):
        file.chmod(0o700 if file.is_dir() else 0o600)
    refit(fresh.path, bank=bank, scale=0.2)
    modes = {file.stat().st_mode & 0o777 for file in fresh.path.iterdir()}
    assert (fresh.path.stat().st_mode & 0o777, modes) == (0o700, {0o600})


def test_a_damaged_bundle_gets_no_new_hashes(fresh: Bundle, bank: Path):
    file = fresh.path / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"SHA-256 differs"):
        refit(fresh.path, bank=bank, scale=0.2)


def test_shared_weights_stay_the_same_file(fresh: Bundle, bank: Path):
    before = (fresh.path / WEIGHTS).stat().st_ino
    refit(fresh.path, bank=bank, scale=0.2)
    assert (fresh.path / WEIGHTS).stat().st_ino == before


@pytest.mark.skipif(os.name != "posix", reason="folders with open files are renamed")
def test_an_engine_that_is_opened_meanwhile_is_of_one_bundle(
    fresh: Bundle, blueprint: Blueprint, bank: Path, make_images: Any, monkeypatch: Any
):
    """The bundle is replaced after the graph was found and before its weights are read."""
    import onnxruntime

    images = make_images(fresh.spec, 2)
    make, opened = onnxruntime.InferenceSession, []

    def replace(*arguments: Any, **options: Any) -> Any:
        session = make(*arguments, **options)
        opened.append(session)
        if len(opened) == 1:
            refit(fresh.path, bank=bank, scale=0.5, verify=False)
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", replace)
    engine = OnnxEngine(fresh, "r08", threads=1)
    monkeypatch.undo()
    wanted = OnnxEngine(Bundle.open(fresh.path), "r08", threads=1).run(images)
    np.testing.assert_array_equal(engine.run(images), wanted)


@pytest.mark.parametrize("verify", [None, False])
def test_an_engine_that_gives_nothing_finite_is_not_kept(
    fresh: Bundle, bank: Path, save_other: Callable[..., Path], verify: bool | None
):
    """It is run without PyTorch, too."""
    file = save_other()
    tensors = load_file(file)
    tensors["norm.weight"][:] = np.float32(3e38)
    save_file(tensors, file)
    before = read(fresh)
    with pytest.raises(CheckFailed, match=r"gives logits that are NaN or Inf; .* left as it was"):
        refit(fresh.path, checkpoint=file, bank=bank, verify=verify)
    assert read(fresh) == before


def test_a_scale_beyond_sense(fresh: Bundle, bank: Path):
    with pytest.raises(InputError, match=r"`scale` 1e[+]38: 0 to 1000"):
        refit(fresh.path, bank=bank, scale=1e38)


def test_a_checkpoint_that_says_another_source(
    fresh: Bundle, bank: Path, save_other: Callable[..., Path]
):
    with pytest.raises(CheckpointError, match="was trained at degree 8 by its metadata"):
        refit(fresh.path, checkpoint=save_other(source=8), bank=bank, source=4)


def test_another_writer_is_not_waited_for(fresh: Bundle, bank: Path):
    program = """
import sys
from pathlib import Path
from tocom_export.io.locking import hold
with hold(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(fresh.path.resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(BusyError, match="is being written by another"):
            refit(fresh.path, bank=bank, scale=0.2, wait=False)
        other.communicate()
    with hold(fresh.path.resolve(), wait=False):
        pass


def test_plans_are_left_and_it_says_so(fresh: Bundle, bank: Path):
    told: list[str] = []
    for name in ("r08.plan", "r08.plan.json"):
        (fresh.path / name).write_bytes(b"plan")
    dataclasses.replace(fresh, plans=("r08",)).save_manifest()
    done = refit(fresh.path, ["r08"], bank=bank, scale=0.2, tell=told.append)
    assert (done.bundle.path / "r08.plan").read_bytes() == b"plan"
    assert any("r08" in line and "refit" in line for line in told)


def test_the_bank_of_the_package_is_not_taken_for_another(
    tmp_path: Path, make_bank: Callable[..., ToComBank]
):
    """The shipped model compensated with a bank of the user's."""
    other = make_bank(known_spec())
    bundle = export(out=tmp_path / "out", targets=(0, 8), bank=other, verify=False)
    assert bundle.bank == other.sha256
    before = read(bundle)
    says = "was compensated with another bank than the one inside the package: name the `bank`"
    with pytest.raises(BankError, match=says):
        refit(bundle.path, scale=0.2)
    with EnginePool(bundle.path) as pool, pytest.raises(BankError, match=says):
        pool.refit(scale=0.2)
    assert read(bundle) == before
    again = refit(bundle.path, bank=other, scale=0.2, verify=False).bundle
    assert again.bank == other.sha256
    shipped = refit(bundle.path, bank=REFERENCE_BANKS["tome"], verify=False).bundle
    assert shipped.bank == ToComBank.load(REFERENCE_BANKS["tome"]).sha256
    refit(bundle.path, scale=0.1, verify=False)


def known_spec() -> VitSpec:
    spec = Checkpoint.open(REFERENCE_CHECKPOINT).info.spec
    assert spec is not None
    return spec

"""Embeddings on the command line: build, inspect, run, verify, and evaluate --knn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.compression.method import Method
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.building import vit_from_spec
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.opening import open_images
from tocom_export.training.model import CompressedVit

Run = Callable[..., Result]
Options = tuple[object, ...]
BOTH = ("--output", "embedding", "--output", "logits")


@pytest.fixture
def both(succeeds: Run, model: Options, here: Path) -> Path:
    """An embedding of length 1, and logits after it."""
    succeeds("build", *model, "--targets", "4,8", *BOTH, "--l2-norm", "--out", "both")
    return here / "both"


@pytest.fixture
def alone(succeeds: Run, model: Options, here: Path) -> Path:
    """Embeddings of a model that has a head."""
    succeeds("build", *model, "--targets", "4,8", "--output", "embedding", "--out", "alone")
    return here / "alone"


@pytest.fixture
def bare(make_checkpoint: Callable, make_spec: Callable, here: Path) -> Path:
    """A checkpoint of a backbone without a head."""
    spec = make_spec(model="tiny", image_size=[32, 32], classes=0)
    info = ModelInfo(spec, 0, Method("tome"))
    (here / "bare").mkdir()
    return make_checkpoint(here / "bare", spec, metadata=to_metadata(info))


def test_what_is_built(succeeds: Run, both: Path, photos: Path, here: Path):
    bundle = Bundle.open(both)
    assert (bundle.outputs, bundle.unit_embedding) == (("embedding", "logits"), True)
    text = succeeds("inspect", both).stdout
    assert "embedding (64, of length 1), logits (10)" in text
    document = json.loads(succeeds("inspect", both, "--json").stdout)
    assert (document["outputs"], document["unit_embedding"]) == (["embedding", "logits"], True)
    graph = json.loads(succeeds("inspect", both / "r08.onnx", "--json").stdout)
    assert graph["outputs"] == {"embedding": "[batch,64]", "logits": "[batch,10]"}
    assert graph["metadata"]["unit_embedding"] == "true"


def test_each_engine_is_held_against_the_model(succeeds: Run, model: Options, both: Path):
    options = (*model[:-1], "--targets", "4,8", *BOTH, "--l2-norm", "--out", "checked")
    document = json.loads(succeeds("build", *options, "--json").stdout)
    assert document["outputs"] == ["embedding", "logits"]
    checks = [variant["check"] for variant in document["variants"]]
    assert all(check["passed"] and check["agreement"] == 100 for check in checks)
    assert {check["output"] for check in checks} <= {"embedding", "logits"}
    assert "worst output" in succeeds("build", *options, "--force").stdout
    table = succeeds("verify", both).stdout
    assert "worst output" in table and "passed" in table
    checks = json.loads(succeeds("verify", both, "--json").stdout)["engines"]
    assert all(check["passed"] for check in checks)


def test_without_torch_no_output_is_the_worst(
    succeeds: Run, model: Options, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "tocom_export.export_checks.is_installed", lambda *names: names == ("onnxruntime",)
    )
    result = succeeds("build", *model[:-1], "--targets", "4,8", *BOTH, "--out", "unchecked")
    assert "there is nothing to compare them with" in result.stderr
    assert "worst output" not in result.stdout


def test_an_engine_that_reads_other_weights_fails_by_its_embedding(
    fails: Run, alone: Path, misreads: Callable
):
    misreads(alone)
    result = fails("verify", alone, says=("r08.onnx differs from the PyTorch model",), status=1)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("r08.onnx"))
    assert line.split()[-2:] == ["FAILED", "embedding"]


def test_both_arrays(succeeds: Run, both: Path, photos: Path, here: Path):
    arrays = ("--output", "logits", "l", "--output", "embedding", "e.npy")
    result = succeeds("run", both, "--variant", 8, photos, *arrays, "--json")
    logits, embedding = np.load(here / "l.npy"), np.load(here / "e.npy")
    assert (logits.shape, embedding.shape, embedding.dtype) == ((12, 10), (12, 64), np.float32)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-6)
    assert "Wrote e.npy: 12 × 64 float32." in result.stderr
    for row, image in zip(logits, json.loads(result.stdout)["images"], strict=True):
        assert image["classes"][0]["index"] == row.argmax()
        assert "embedding" not in image
    bundle = Bundle.open(both)
    images = bundle.preprocess.load_batch(sorted(photos.rglob("*.png")), (32, 32))
    wanted = bundle.engine(8).run_all(images)
    np.testing.assert_allclose(embedding, wanted["embedding"], atol=1e-5)
    np.testing.assert_allclose(logits, wanted["logits"], atol=1e-4)


def test_embeddings_alone(succeeds: Run, fails: Run, alone: Path, photos: Path, here: Path):
    result = succeeds("run", alone, photos / "a" / "0.png", "--output", "embedding", "e")
    assert result.stdout.splitlines()[1].split() == ["image", "channels", "length"]
    assert "gives embeddings" not in result.stderr, "they were asked for"
    told = succeeds("run", alone, photos / "a" / "0.png").stderr
    assert "gives no logits: it gives embeddings; --output embedding FILE" in told
    (row,) = np.load(here / "e.npy")
    assert f"{np.linalg.norm(row):.2f}" in result.stdout.splitlines()[2]
    says = ("gives no logits", "build it with --output logits")
    fails("run", alone, photos, "--output", "logits", "l", says=says)


def test_an_output_that_a_bundle_lacks(fails: Run, bundle: Path, here: Path):
    says = (f"{bundle} gives no embedding (logits alone)", "build it with --output embedding")
    fails("run", bundle, "none.png", "--output", "embedding", "e", says=says)
    assert not list(here.iterdir())
    fails("run", bundle, "x.png", "--output", "mask", "m", says=("'mask'", "logits", "embedding"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--l2-norm",), ("--l2-norm is of embeddings", "--output")),
        (("--output", "probs"), ("--output", "'probs'", "logits")),
        (("--output", "map"), ("--output map alone",)),
        (
            ("--output", "tokens", "--method", "evit", "--bank", "none"),
            ("--output tokens: evit drops patches",),
        ),
    ],
)
def test_what_can_t_be_built(fails: Run, model: Options, here: Path, options: Options, says: Any):
    fails("build", *model, *options, says=says)
    assert not list(here.iterdir())


def test_a_model_without_a_head(succeeds: Run, fails: Run, bare: Path, photos: Path, here: Path):
    model = ("--checkpoint", bare, "--bank", "none", "--targets", "0,8", "--out", "b")
    fails("build", *model, "--output", "logits", says=("--output logits", "tiny has no head"))
    succeeds("build", *model)
    assert Bundle.open("b").outputs == ("embedding",)
    photo = photos / "a" / "0.png"
    fails("run", "b", photo, "--output", "logits", "l", says=("b gives no logits", "no head"))
    succeeds("run", "b", photo, "--output", "embedding", "e")
    assert np.load(here / "e.npy").shape == (1, 64)


def test_tokens_and_maps(
    run: Run, succeeds: Run, fails: Run, model: Options, photos: Path, here: Path
):
    dense = ("--output", "tokens", "--output", "map")
    document = json.loads(
        succeeds("build", *model[:-1], "--targets", "0,8", *dense, "--out", "d", "--json").stdout
    )
    assert document["outputs"] == ["tokens", "map"]
    assert all(variant["check"]["passed"] for variant in document["variants"])
    spec = Bundle.open("d").spec
    assert f"tokens ({spec.patches} × 64), map ({spec.patches})" in succeeds("inspect", "d").stdout
    (here / "none.png").write_bytes(b"none")
    files = (photos / "a" / "0.png", here / "none.png", photos / "b" / "1.png")
    arrays = ("--output", "tokens", "t", "--output", "map", "m.npy")
    result = run("run", "d", "--variant", 8, *files, *arrays)
    assert result.exit_code == 2 and "none.png is not an image" in result.stderr
    shape = f"3 × {spec.patches}"
    assert f"Wrote t.npy: {shape} × 64 float32." in result.stderr
    assert f"Wrote m.npy: {shape} int32." in result.stderr
    tokens, places = np.load(here / "t.npy"), np.load(here / "m.npy")
    assert np.isnan(tokens[1]).all() and (places[1] == -1).all()
    bundle = Bundle.open("d")
    images = bundle.preprocess.load_batch([files[0], files[2]], (32, 32))
    wanted = bundle.engine(8).run_all(images)
    np.testing.assert_allclose(tokens[::2], wanted["tokens"], atol=1e-5)
    np.testing.assert_array_equal(places[::2], wanted["map"])
    _, header, *rows = succeeds("run", "d", files[0]).stdout.splitlines()
    assert header.split() == ["image", "tokens", "map"]
    assert rows[0].split()[1:] == [str(spec.patches), "×", "64", str(spec.patches)]
    told = succeeds("run", "d", files[0], "--json")
    assert json.loads(told.stdout)["images"][0]["shapes"] == {
        "tokens": [spec.patches, 64], "map": [spec.patches]
    }  # fmt: skip
    assert "it gives tokens; --output tokens FILE writes them" in told.stderr
    succeeds("verify", "d")
    fails("run", "d", files[0], "--output", "tokens", "x", "--output", "map", "x.npy",
          says=("--output x.npy is named twice",))  # fmt: skip
    fails("run", "d", files[0], "--output", "embedding", "x", says=("gives no embedding",))
    assert not (here / "x.npy").exists()


def test_arrays_of_images_of_which_none_can_be_read(fails: Run, both: Path, here: Path):
    (here / "none.png").write_bytes(b"none")
    fails("run", both, "none.png", "--output", "embedding", "e", says=("none.png",))
    assert not (here / "e.npy").exists()


def test_accuracy_by_logits_needs_some(fails: Run, alone: Path, labelled: Callable, bare: Path):
    data = labelled("moons", [0] * 48)
    says = (f"{alone} gives no logits (embedding alone)",)
    fails("evaluate", alone, "--data", data, says=says)
    fails("verify", alone, "--data", data, says=says)
    fails("bench", alone, "--pick", "--data", data, says=says)
    options = (bare, "--bank", "none", "--data", data)
    fails("evaluate", *options, says=(f"{bare} has no head that names classes", "--knn"))


# evaluate --knn


LABELS = np.random.default_rng(1).integers(0, 3, 48).tolist()


@pytest.fixture
def train(make_shards: Callable, pictures: list[bytes], tmp_path: Path, info: ModelInfo) -> Path:
    """Half of the pictures, under labels of which any model is right on few alone."""
    return make_shards(tmp_path / "train", pictures[:24], LABELS[:24], info.classes)


@pytest.fixture
def test_set(make_shards: Callable, pictures: list[bytes], tmp_path: Path, info: ModelInfo) -> Path:
    """The other half."""
    return make_shards(tmp_path / "moons", pictures[24:], LABELS[24:], info.classes)


@torch.inference_mode()
def expect(file: Path, spec: VitSpec, train: Path, test: Path, degree: int, count: int) -> float:
    """Plain PyTorch and plain loops."""
    vit = vit_from_spec(spec)
    vit.load_state_dict(load_file(file))
    model = CompressedVit(vit, Method("tome"), spec.model).eval()

    def embed(place: Path) -> tuple[np.ndarray, np.ndarray]:
        ((images, labels),) = EvalData(open_images(place), spec, Preprocess())
        found = model.embedding(images, degree).numpy().astype(np.float64)
        return found / np.linalg.norm(found, axis=1, keepdims=True), labels.numpy()

    (known, names), (asked, wanted) = embed(train), embed(test)
    right = 0
    for row, label in zip(asked @ known.T, wanted, strict=True):
        votes = np.zeros(10)
        for index in np.argsort(-row)[:count]:
            votes[names[index]] += np.exp(row[index] / 0.07)
        right += int(votes.argmax() == label)
    return 100 * right / len(wanted)


def rows_of(result: Result) -> list[dict[str, Any]]:
    return json.loads(result.stdout)["rows"]


@pytest.mark.parametrize("count", [None, 2])
def test_a_checkpoint_by_its_neighbours(
    succeeds: Run, checkpoint: Path, bare: Path, train: Path, test_set: Path, spec: VitSpec,
    make_spec: Callable, count: int | None,
):  # fmt: skip
    options = ("--knn", train, "--data", test_set, "--targets", "0,4,8", "--bank", "none")
    options = (*options, "--batch", 20, *(("--neighbours", count) if count else ()))
    headless = make_spec(model="tiny", image_size=[32, 32], classes=0)
    for file, of in ((checkpoint, spec), (bare, headless)):
        rows = rows_of(succeeds("evaluate", file, *options, "--json"))
        assert [row["neighbours"] for row in rows] == [count or 20] * 3
        wanted = [expect(file, of, train, test_set, d, count or 20) for d in (0, 4, 8)]
        assert [row["baseline"] for row in rows] == wanted
        assert count is None or len({*wanted}) > 1  # or it would say little
    table = succeeds("evaluate", bare, *options).stdout
    near = f"{count or 20} nearest neighbours in {train.parent.name}/train"
    assert table.startswith(f"moons, 24 images, tome, {near}")


def test_a_bundle_by_its_neighbours(
    succeeds: Run, fails: Run, alone: Path, both: Path, bundle: Path, checkpoint: Path,
    bank_file: Path, train: Path, test_set: Path,
):  # fmt: skip
    options = ("--knn", train, "--data", test_set, "--neighbours", 2)
    expected = rows_of(
        succeeds("evaluate", checkpoint, *options, "--bank", bank_file, "--targets", "4,8",
                 "--json")
    )  # fmt: skip
    for path in (alone, both):
        result = succeeds("evaluate", path, *options, "--check", "--json")
        rows = rows_of(result)
        assert [(r["baseline"], r["tocom"]) for r in rows] == [
            (r["baseline"], r["tocom"]) for r in expected
        ]
        assert all(check["passed"] for check in json.loads(result.stdout)["checks"])
    assert expected[1]["tocom"] != expected[1]["baseline"]
    says = (f"{bundle} gives no embedding", "build it with --output embedding")
    fails("evaluate", bundle, *options, says=says)
    says = (f"--record: {both} gives logits", "leave --knn or --record out")
    fails("evaluate", both, *options, "--record", says=says)
    succeeds("evaluate", alone, *options, "--record")
    assert Bundle.open(alone).accuracy == {row["variant"]: row["tocom"] for row in expected}


def test_a_study_of_both_kinds(
    succeeds: Run, checkpoint: Path, train: Path, test_set: Path, here: Path
):
    options = (checkpoint, "--data", test_set, "--bank", "none", "--targets", 8, "--out", "study")
    succeeds("evaluate", *options)
    near = succeeds("evaluate", *options, "--knn", train, "--json")
    head, voted = rows_of(near)
    assert "neighbours" not in head and voted["neighbours"] == 20
    assert voted["knn"] == f"{train.parent.name}/train"
    train.rename(train.with_name("others"))
    succeeds("evaluate", *options, "--knn", train.with_name("others"))
    page = (here / "study" / "results.md").read_text()
    for name in ("train", "others"):
        assert f"## Accuracies by the 20 nearest neighbours in {train.parent.name}/{name}" in page
    assert len(rows_of(succeeds("evaluate", "--out", "study", "--json"))) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--neighbours", 5), ("--neighbours is for --knn",)),
        (("--knn", "moons"), ("--knn is the same as --data moons",)),
        (("--knn", "train", "--neighbours", 99), ("--knn train has 24 images", "--neighbours")),
        (("--knn", "nowhere"), ("nowhere: no such folder",)),
    ],
)
def test_neighbours_that_can_t_be(
    fails: Run, checkpoint: Path, train: Path, test_set: Path, here: Path, options: Any, says: Any
):
    train.rename(here / "train")
    test_set.rename(here / "moons")
    given = (checkpoint, "--bank", "none", "--targets", 0, "--data", "moons")
    fails("evaluate", *given, *options, says=says)


def test_splits_of_one_set(
    succeeds: Run, fails: Run, checkpoint: Path, image_folder: Callable[..., Path], here: Path
):
    """Training images are those of the training split, unless they are told otherwise."""
    for split in ("train", "test"):
        image_folder(here / "root" / split)
    name = "torch/image_folder"
    options = (checkpoint, "--bank", "none", "--targets", 0, "--neighbours", 2)
    options = (*options, "--data-root", "root", "--data", name)
    (row,) = rows_of(succeeds("evaluate", *options, "--knn", name, "--json"))
    assert (row["dataset"], row["images"], row["knn"]) == ("image_folder", 12, name)
    says = (f"--knn is the same as --data {name}:test; name other images",)
    fails("evaluate", *options, "--knn", f"{name}:test", says=says)


def test_other_classes(fails: Run, checkpoint: Path, test_set: Path, photos: Path):
    options = ("--bank", "none", "--knn", photos, "--data", test_set)
    says = (f"--knn {photos} has 2 classes", f"--data {test_set} has 10", "same order")
    fails("evaluate", checkpoint, *options, says=says)
    fails("evaluate", "--knn", "x", "--out", "study", says=("name a checkpoint",))

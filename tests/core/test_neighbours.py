"""Accuracy by the nearest neighbours: planted answers, brute force, and what can't be."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.compression.method import Method
from tocom_export.errors import DataError, InputError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.study import neighbours as module
from tocom_export.study.evaluate import measure
from tocom_export.study.markdown import format_page
from tocom_export.study.neighbours import Neighbours, measure_neighbours
from tocom_export.study.publish import publish
from tocom_export.study.results import Results, Row, parse_row
from tocom_export.study.rows import check_conflicts, make_rows
from tocom_export.study.subject import Subject
from tocom_export.variant import Variant

Array = np.ndarray


class Data:
    """Images that are their own embeddings (N, F), in batches."""

    def __init__(self, name: str, vectors: Array, labels: Array, classes: int, batch: int = 7):
        self.name, self.classes = name, tuple(f"c{number}" for number in range(classes))
        self.vectors, self.labels, self.batch = vectors, labels, batch

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for at in range(0, len(self.labels), self.batch):
            rows = slice(at, at + self.batch)
            yield self.vectors[rows, :, None, None], self.labels[rows]


def identity(images: Array) -> Array:
    return images[:, :, 0, 0]


def brute_force(train: Data, test: Data, count: int) -> Array:
    """All similarities at once, in float64, as the paper says it."""
    one, two = (d.vectors.astype(np.float64) for d in (train, test))
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    two /= np.linalg.norm(two, axis=1, keepdims=True)
    near = two @ one.T
    found = []
    for row in near:
        votes = np.zeros(len(train.classes))
        for index in np.argsort(-row, kind="stable")[:count]:
            votes[train.labels[index]] += np.exp(row[index] / 0.07)
        found.append(votes.argmax())
    return np.array(found)


def plant(
    rng: np.random.Generator, each: int, noise: float, classes: int = 5
) -> tuple[Array, Array]:
    """Clusters around axes, of very different lengths."""
    labels = rng.permutation(np.repeat(np.arange(classes), each))
    vectors = np.eye(16)[labels] + noise * rng.standard_normal((len(labels), 16))
    return (vectors * rng.uniform(0.1, 50, (len(labels), 1))).astype(np.float32), labels


def said(scores: Any) -> Array:
    return np.concatenate(scores.predicted)


def test_planted_clusters_are_found():
    rng = np.random.default_rng(0)
    train, test = (Data(n, *plant(rng, 30, 0.05), 5) for n in ("train", "test"))
    wrong = test.labels.copy()
    wrong[:15] = (wrong[:15] + 1) % 5  # of 150
    test = Data("test", test.vectors, wrong, 5)
    seen: list[int] = []
    (score,) = measure_neighbours([identity], test, Neighbours(train), seen.append)
    assert (score.total, score.right, score.accuracy) == (150, 135, 90)
    assert sum(seen) == 300
    assert score.throughput > 0
    assert [len(batch) for batch in score.predicted] == [7] * 21 + [3]


@pytest.mark.parametrize("count", [1, 5, 20, 60])
@pytest.mark.parametrize("rows", [8, 4096])
def test_it_is_what_brute_force_says(count: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Whatever the batches."""
    monkeypatch.setattr(module, "_ROWS", rows)
    rng = np.random.default_rng(count)
    (some, labels), (others, wanted) = plant(rng, 12, 0.6), plant(rng, 9, 0.6)
    train, test = Data("train", some, labels, 5), Data("test", others, wanted, 5)
    expected = brute_force(train, test, count)
    assert 0 < (expected == wanted).mean() < 1
    for batches in ((1, 1), (7, 11), (60, 45), (1000, 1000)):
        train.batch, test.batch = batches
        scores = measure_neighbours([identity, identity], test, Neighbours(train, count))
        for score in scores:
            np.testing.assert_array_equal(said(score), expected)


def test_near_ones_weigh_more():
    """Two that are near outvote eighteen that are not."""
    near, far = [1.0, 0.1], [0.1, 1.0]
    train = Data("train", np.array([near] * 2 + [far] * 18, np.float32), np.arange(20) // 2 > 0, 2)
    train.labels = train.labels.astype(int)
    test = Data("test", np.array([[2.0, 0.0]], np.float32), np.array([0]), 2)
    (score,) = measure_neighbours([identity], test, Neighbours(train, 20))
    assert said(score) == [0]


def test_embeddings_that_are_no_numbers():
    """They are wrong where they are tested, and nobody's neighbours where they are to vote."""
    rng = np.random.default_rng(0)
    train, test = (Data(n, *plant(rng, 8, 0.05), 5) for n in ("train", "test"))
    train.vectors[3], test.vectors[[0, 9]] = np.nan, np.inf
    (score,) = measure_neighbours([identity], test, Neighbours(train, 5))
    assert (score.unusable, score.right, score.total) == (2, 38, 40)
    test.vectors[0] = 0  # without a direction, yet a number
    (score,) = measure_neighbours([identity], test, Neighbours(train, 5))
    assert score.unusable == 1


def test_a_model_of_which_training_images_are_no_numbers():
    """Nobody votes on anything, and for no class; beside a model that is sound."""
    rng = np.random.default_rng(0)
    train, test = (Data(n, *plant(rng, 8, 0.05), 5) for n in ("train", "test"))

    def break_some(images: Array) -> Array:
        found = identity(images).copy()
        found[np.isin(found[:, 0], train.vectors[1:, 0])] = np.nan
        return found

    broken, sound = measure_neighbours([break_some, identity], test, Neighbours(train, 2))
    assert (broken.right, broken.unusable, broken.total) == (0, 40, 40)
    assert (sound.right, sound.unusable) == (40, 0)
    (one,) = measure_neighbours([break_some], test, Neighbours(train, 1))
    assert (said(one) == train.labels[0]).all()
    says = "`knn` train: 1 of 40 embeddings are free of NaN and Inf; lower `neighbours`, of which 2"
    with pytest.raises(DataError, match=says):
        measure_neighbours([break_some], test, Neighbours(train, 2))


def test_embeddings_are_in_memory_once():
    count, width = 16384, 256

    class Many(Data):
        def __iter__(self) -> Iterator[tuple[Any, Any]]:
            for _ in range(0, count, 256):
                yield np.ones((256, width, 1, 1), np.float32), np.zeros(256, int)

    train = Data("train", np.eye(20, width, dtype=np.float32), np.zeros(20, int), 2)
    test = Many("test", np.zeros((0, width)), np.zeros(0, int), 2)
    gc.collect()
    tracemalloc.start()
    try:
        measure_neighbours([lambda x: x[:, :, 0, 0].copy()], test, Neighbours(train, 1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.6 * 4 * count * width


def test_too_few_to_vote():
    vectors = np.eye(4, dtype=np.float32)
    train, test = (Data(n, vectors, np.arange(4), 4) for n in ("train", "test"))
    with pytest.raises(DataError, match="`knn` train has 4 images; lower `neighbours`, of which 5"):
        measure_neighbours([identity], test, Neighbours(train, 5))
    train.total = 4  # type: ignore[attr-defined]  # where that is known, before the work
    with pytest.raises(DataError, match="`knn` train has 4 images; lower `neighbours`, of which 5"):
        Neighbours(train, 5).check(test, "data")
    Neighbours(train, 4).check(test, "data")
    with pytest.raises(InputError, match="`neighbours` 0: there is one at least"):
        Neighbours(train, 0)


@pytest.fixture
def subject(make_spec: Callable[..., VitSpec]) -> Subject:
    """Its embeddings turn to noise the more tokens are removed, unless it is compensated."""
    spec = make_spec(classes=0)

    def runner(variant: Variant) -> Callable[[Array], Array]:
        noise = 0.0 if variant.compensated else max(variant.degrees) / 2

        def run(images: Array) -> Array:
            found = identity(images)
            rng = np.random.default_rng(len(found))
            lengths = np.linalg.norm(found, axis=1, keepdims=True)
            return found + (noise * lengths * rng.standard_normal(found.shape)).astype(np.float32)

        return run

    variants = (Variant.of(spec, 0), Variant.of(spec, 8), Variant.of(spec, (9, 5, 2, 0), "fast"))
    return Subject(
        Path("bare.safetensors"), spec, Preprocess(), None, Method("tome"), variants,
        runner=runner, backend="torch",
    )  # fmt: skip


@pytest.fixture
def sets() -> tuple[Data, Data]:
    rng = np.random.default_rng(0)
    train, test = (Data(n, *plant(rng, 40, 0.05), 5) for n in ("train", "moons"))
    return train, test


def test_with_and_without_the_bank(subject: Subject, sets: Any):
    train, test = sets
    steps: list[tuple[str, int]] = []

    class Progress:
        def __init__(self, title: str, count: int) -> None:
            steps.append((title, count))

        def __enter__(self) -> Callable[[str], None]:
            return lambda step: None

        def __exit__(self, *_: object) -> None: ...

    found = measure([subject], test, progress=Progress, neighbours=Neighbours(train))
    assert steps == [("evaluating", 29 + 29)]
    assert [m.served.accuracy for m in found] == [100] * 3
    assert found[0].plain.accuracy == 100
    assert all(m.plain.accuracy < 95 for m in found[1:])
    rows = make_rows(found, "moons", "tocom", 0, 20, "moons/train")
    assert {(row.neighbours, row.knn) for row in rows} == {(20, "moons/train")}
    assert [row.describe()["neighbours"] for row in rows] == [20] * 3
    assert [parse_row(row.describe()) for row in rows] == rows


def test_other_classes_or_the_same_images(subject: Subject, sets: Any):
    train, test = sets
    fewer = Data("train", train.vectors, train.labels, 4)
    with pytest.raises(DataError, match="`knn` train has 4 classes and `data` moons has 5"):
        measure([subject], test, neighbours=Neighbours(fewer))
    with pytest.raises(InputError, match="`knn` is the same as `data` moons"):
        measure([subject], test, neighbours=Neighbours(Data("./moons", *plant(
            np.random.default_rng(0), 5, 0.1), 5)))  # fmt: skip
    with pytest.raises(InputError, match="`knn` is the same as `held_out` train"):
        measure([subject], test, train, neighbours=Neighbours(train))
    with pytest.raises(DataError, match=r"bare\.safetensors has no head that names classes; .*knn"):
        measure([subject], test)


def row(**changes: Any) -> Row:
    return replace(Row("moons", "tome", 0, 8, 50.0, 60.0, None, 0, images=100), **changes)


def test_rows_of_both_kinds_stay_apart():
    """In one study, of one data set."""
    head, near = row(), row(baseline=70.0, tocom=80.0, neighbours=20)
    fewer = replace(near, neighbours=5, baseline=69.0)
    trained = row(source=8, baseline=90.0, tocom=None, neighbours=20)
    merged = Results((head, near, fewer)).merge([trained]).rows
    assert [r.reference for r in merged] == [None, 90, None, 90]
    page = format_page(Results(merged), {})
    first, *sections = page.split("## Accuracies by the ")
    assert [section.split(" ")[0] for section in sections] == ["20", "5"]
    assert "| 0 → 8 | 50.00 | 60.00 | +10.00 |" in first and "70.00" not in first
    assert "| 0 → 8 | 70.00 | 80.00 | +10.00 | 90.00 |" in sections[0]
    assert "| 0 → 8 | 69.00 |" in sections[1]
    fast = row(target=None, schedule="fast", neighbours=20, baseline=33.0)
    assert "| fast | moons | ToMe" in format_page(Results((fast,)), {})


def test_rows_by_other_training_images_stay_apart():
    one = row(baseline=70.0, neighbours=20, knn="moons/train")
    other = replace(one, knn="stars|all", baseline=90.0)
    trained = replace(one, source=8, baseline=80.0, tocom=None)
    merged = Results((one,)).merge([other, trained]).rows
    assert [(r.baseline, r.reference) for r in merged] == [(70, 80), (90, None), (80, 80)]
    page = format_page(Results(merged), {})
    _, first, second = page.split("## Accuracies by the 20 nearest neighbours in ")
    assert first.startswith("moons/train\n") and "70.00" in first and "90.00" not in first
    assert second.startswith("stars\\|all\n") and "90.00" in second


def test_a_study_without_them_is_written_as_before(tmp_path: Path):
    publish(tmp_path / "a", [row()])
    assert "neighbours" not in (tmp_path / "a" / "results.json").read_text()
    assert "neighbours" not in (tmp_path / "a" / "results.csv").read_text()
    publish(tmp_path / "a", [row(neighbours=20)])
    lines = (tmp_path / "a" / "results.csv").read_text().splitlines()
    assert lines[0].endswith(",schedule,neighbours,accuracy,accuracy_low,accuracy_high")
    assert len(lines) == 3
    assert len(Results.load(tmp_path / "a" / "results.json").rows) == 2


def test_a_model_owns_its_rows_of_each_kind(subject: Subject):
    known = [row(model="other.safetensors", neighbours=20)]
    check_conflicts([subject], "moons", "tocom", 0, known)
    check_conflicts([subject], "moons", "tocom", 0, known, 5)
    with pytest.raises(InputError, match="would share their rows"):
        check_conflicts([subject], "moons", "tocom", 0, known, 20)
    check_conflicts([subject], "moons", "tocom", 0, known, 20, "others")

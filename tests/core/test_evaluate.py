from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export.compression.method import Method
from tocom_export.errors import InputError
from tocom_export.graph.precision import Precision
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.study.accuracy import Difference
from tocom_export.study.evaluate import SCALES, measure
from tocom_export.study.results import Row
from tocom_export.study.rows import check_conflicts, make_rows
from tocom_export.study.subject import Subject
from tocom_export.variant import Variant

FAST = (9, 5, 2, 0)


class Data:
    """20 images that hold their number, all of class 0, in two batches."""

    def __init__(self, name: str) -> None:
        self.name, self.classes = name, tuple("abcdefghij")

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for first in (0, 10):
            numbers = np.arange(first, first + 10, dtype=np.float32)
            yield numbers.reshape(-1, 1, 1, 1), np.zeros(10, int)


DATA = Data("images")


def right(count: int) -> Callable[[np.ndarray], np.ndarray]:
    """A run that is right on the first so many images."""

    def run(images: np.ndarray) -> np.ndarray:
        predicted = (images[:, 0, 0, 0] >= count).astype(int)
        return np.eye(10, dtype=np.float32)[predicted]

    return run


def answer(variant: Variant) -> Callable[[np.ndarray], np.ndarray]:
    """Half of the images are right; with the bank, more by 100 times its scale."""
    return right(10 + round(100 * variant.scale * variant.compensated) // 2)


@pytest.fixture
def subject(make_spec: Callable[..., VitSpec]) -> Subject:
    spec = make_spec()
    variants = (
        Variant.of(spec, 0), Variant.of(spec, 8), Variant.of(spec, FAST, "fast"),
    )  # fmt: skip
    return Subject(
        Path("r00.safetensors"), spec, Preprocess(), None, Method("tome"), variants,
        runner=answer, backend="torch",
    )  # fmt: skip


def test_each_variant_with_and_without_the_bank(subject: Subject):
    zero, eight, fast = measure([subject], DATA)
    assert [found.variant for found in (zero, eight, fast)] == list(subject.variants)
    assert zero.compensated is None  # its own degree
    assert eight.compensated is not None
    assert (eight.plain.accuracy, eight.compensated.accuracy) == (50, 75)
    assert eight.served is eight.compensated
    assert zero.served is zero.plain
    assert fast.served.accuracy == 75
    assert all(found.oracle is None for found in (zero, eight, fast))


def test_rows_go_by_degree_or_by_name(subject: Subject):
    deep = Variant.of(subject.spec, (20,) * subject.spec.depth, "r20")  # no bank reaches so far
    same = Variant.of(subject.spec, 8, "same")
    subject = replace(subject, variants=(*subject.variants, deep, same))
    rows = make_rows(measure([subject], DATA), "moons", "mine", 3)
    assert [(row.target, row.schedule, row.name) for row in rows] == [
        (0, "", "r00"), (8, "", "r08"), (None, "fast", "fast"), (None, "r20", "r20"),
        (None, "same", "same"),
    ]  # fmt: skip
    assert {(row.dataset, row.variant, row.seed) for row in rows} == {("moons", "mine", 3)}
    assert [row.scale for row in rows] == [None, *[0.1] * 4]
    assert [row.tocom for row in rows] == [50, *[75] * 4]
    assert [row.reference for row in rows] == [50, *[None] * 4]


def test_without_a_bank(subject: Subject):
    variants = tuple(replace(variant, compensated=False) for variant in subject.variants)
    rows = make_rows(measure([replace(subject, variants=variants)], DATA), "moons", "tocom", 0)
    assert {(row.baseline, row.tocom, row.scale) for row in rows} == {(50, None, None)}


def test_a_scale_for_all(subject: Subject):
    found = measure([subject], DATA, scale=0.2)
    assert [m.served.accuracy for m in found] == [50, 100, 100]
    assert {m.variant.scale for m in found} == {0.2}


def test_scales_are_chosen_on_held_out_images(subject: Subject):
    titles: list[tuple[str, int]] = []

    class Progress:
        def __init__(self, title: str, steps: int) -> None:
            titles.append((title, steps))

        def __enter__(self) -> Callable[[str], None]:
            return lambda step: None

        def __exit__(self, *_: object) -> None: ...

    found = measure([subject], DATA, Data("others"), progress=Progress)
    assert [m.variant.scale for m in found] == [0.1, max(SCALES), max(SCALES)]
    assert titles == [("choosing scales", 2), ("evaluating", 2)]


def test_the_scale_without_labels_is_that_of_the_least_divergence(subject: Subject):
    """What the bank adds here takes a model away from what it says without merging."""
    zero, eight, _ = measure([subject], DATA, Data("others"))
    assert zero.unlabelled is None
    assert eight.unlabelled is not None
    scale, score = eight.unlabelled
    assert (scale, score.accuracy) == (min(SCALES), 50)
    assert eight.variant.scale == max(SCALES)
    rows = make_rows([zero, eight], "images", "tocom", 0)
    assert [(row.unlabelled_scale, row.unlabelled) for row in rows] == [
        (None, None),
        (min(SCALES), 50),
    ]


def test_held_out_images_that_are_the_test_images(subject: Subject):
    with pytest.raises(InputError, match="`held_out` is the same as `data`"):
        measure([subject], DATA, Data("./images"))


def test_a_scale_that_is_chosen_and_given(subject: Subject):
    with pytest.raises(InputError, match="one of the two"):
        measure([subject], DATA, Data("others"), scale=0.1)


@pytest.mark.parametrize("chosen", [{"scale": 0.1}, {"held_out": Data("others")}], ids=" ".join)
def test_scales_that_are_baked_in(subject: Subject, chosen: Any):
    with pytest.raises(InputError, match=r"`scale`: .* have theirs baked in"):
        measure([replace(subject, baked=True)], DATA, **chosen)


class Oracle:
    """PyTorch, which is right on so many images."""

    def __init__(self, count: int) -> None:
        self.count = count

    def runner(self, variant: Variant) -> Callable[[np.ndarray], np.ndarray]:
        return right(self.count)

    def stored_as(self, variant: Variant) -> Precision:
        return "fp32"


def test_an_engine_beside_its_oracle(subject: Subject):
    engine = replace(subject, baked=True, backend="onnx", oracle=Oracle(14))
    found = measure([engine], DATA, check=True)[1]
    assert found.oracle is not None
    assert (found.served.accuracy, found.oracle.accuracy) == (75, 70)
    assert found.served.compare(found.oracle) == Difference(1, 0, 20)
    assert measure([engine], DATA)[1].oracle is None


def test_a_name_that_is_taken(subject: Subject):
    with pytest.raises(InputError, match="r08 is asked for twice"):
        replace(subject, variants=(*subject.variants, subject.variants[1]))


def test_two_models_with_the_same_rows(subject: Subject):
    other = replace(subject, path=Path("other.safetensors"))
    check_conflicts([subject], "moons", "tocom", 0)
    with pytest.raises(InputError, match=r"would share their rows.*`bank_name`, `seed` or `name`"):
        check_conflicts([subject, other], "moons", "tocom", 0)
    known = Row("moons", "tome", 0, 4, 50.0, None, None, 0, model="other.safetensors")
    with pytest.raises(InputError, match=r"r00.safetensors and other.safetensors are both"):
        check_conflicts([subject], "moons", "tocom", 0, [known])
    check_conflicts([subject], "moons", "tocom", 1, [known])
    check_conflicts([other], "moons", "tocom", 0, [known])

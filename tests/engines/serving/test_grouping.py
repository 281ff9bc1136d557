"""Requests run by variant, and what becomes of those that can't be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.engines.serving.grouping import Answer, run_grouped
from tocom_export.engines.serving.loaded import Serving
from tocom_export.errors import BundleError, ImageError


@pytest.fixture
def pool(fresh: Bundle) -> Iterator[EnginePool]:
    with EnginePool(fresh.path, threads=1) as pool:
        yield pool


def test_each_gets_its_own_in_order(pool: EnginePool, images: Any):
    eight, sixteen = pool.open(8), pool.open("r16")
    batches = [images[:1], images[1:], images, images[2:]]
    seen: list[tuple[str, int]] = []
    answers = run_grouped(
        batches,
        [eight, sixteen, eight, eight],
        lambda serving, count, seconds: seen.append((serving.variant.name, count)),
    )
    assert [a.serving.variant.name for a in answers] == ["r08", "r16", "r08", "r08"]
    for batch, answer in zip(batches, answers, strict=True):
        wanted = answer.serving.run(batch)
        np.testing.assert_allclose(answer.outputs["logits"], wanted, atol=1e-5)
    assert seen == [("r08", 5), ("r16", 2)]


def test_a_bad_image_is_its_own_request_s_alone(pool: EnginePool, images: Any):
    broken = images.copy()
    broken[1, 0, 0, 0] = np.nan
    eight, sixteen = pool.open(8), pool.open(16)
    seen: list[int] = []
    first, second, third, fourth = run_grouped(
        [images, broken, images, images],
        [eight, eight, sixteen, eight],
        lambda serving, count, seconds: seen.append(count),
    )
    assert isinstance(second, ImageError)
    assert str(second) == "image 1 of the batch has pixels that are NaN or Inf."
    for answer, serving in ((first, eight), (third, sixteen), (fourth, eight)):
        assert isinstance(answer, Answer)
        np.testing.assert_allclose(answer.outputs["logits"], serving.run(images), atol=1e-5)
    assert seen == [3, 3, 3]


def test_other_errors_are_those_of_the_group(pool: EnginePool, images: Any, monkeypatch):
    eight, sixteen = pool.open(8), pool.open(16)
    plain = Serving.run_all

    def run(self: Serving, images: Any) -> Any:
        if self is eight:
            raise BundleError("damaged.")
        return plain(self, images)

    monkeypatch.setattr(Serving, "run_all", run)
    first, second = run_grouped([images, images], [eight, sixteen])
    assert isinstance(first, BundleError)
    assert isinstance(second, Answer)


def test_nothing(pool: EnginePool):
    assert run_grouped([], []) == []

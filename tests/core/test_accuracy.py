from __future__ import annotations

import numpy as np
import pytest
import torch

from tocom_export.study.accuracy import (
    Difference,
    Score,
    find_interval,
    find_reach,
    format_accuracy,
    measure_accuracy,
)


def says(*classes: int, of: int = 4):
    """A model that reads its answers from the images: image i is of class ``classes[i]``."""

    def run(images: np.ndarray) -> np.ndarray:
        return np.eye(of, dtype=np.float32)[[classes[int(i)] for i in images[:, 0, 0, 0]]]

    return run


def batches(labels: list[int], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images that hold their number."""
    images = np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1)
    starts = range(0, len(labels), size)
    return [(images[s : s + size], np.array(labels[s : s + size])) for s in starts]


class Clock:
    """Stands in for the module's ``time``: each look is ``tick`` later."""

    def __init__(self) -> None:
        self.now, self.tick = 0.0, 1.0

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


def test_the_right_ones_are_counted_over_all_batches():
    models = [says(0, 1, 2, 3, 0), says(0, 1, 2, 0, 1), says(3, 3, 3, 1, 1)]
    scores = measure_accuracy(models, batches([0, 1, 2, 3, 0], 2))
    assert [(s.right, s.total, s.unusable) for s in scores] == [(5, 5, 0), (3, 5, 0), (0, 5, 0)]
    assert [s.accuracy for s in scores] == [100.0, 60.0, 0.0]


def test_tensors_do_as_well_as_arrays():
    tensors = [(torch.from_numpy(i), torch.from_numpy(w)) for i, w in batches([2, 1, 0], 2)]
    (result,) = measure_accuracy([says(2, 1, 1)], tensors)
    assert (result.right, result.total) == (2, 3)


def test_the_images_on_which_two_differ():
    models = [says(0, 1, 2, 3, 0), says(0, 1, 3, 3, 1), says(0, 1, 2, 3, 0)]
    first, second, third = measure_accuracy(models, batches([3, 3, 3, 3, 3], 2))
    assert first.count_differences(second) == second.count_differences(first) == 2
    assert first.count_differences(third) == 0


def test_counting_differences_needs_the_same_batches():
    (first,) = measure_accuracy([says(0, 1, 2)], batches([0, 1, 2], 2))
    (second,) = measure_accuracy([says(0, 1, 2)], batches([0, 1, 2], 3))
    with pytest.raises(ValueError):
        first.count_differences(second)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_is_wrong(value: float):
    def broken(images: np.ndarray) -> np.ndarray:
        logits = says(0, 1, 2)(images)
        logits[images[:, 0, 0, 0] == 1, 3] = value  # the right class is still the largest
        return logits

    (result, whole) = measure_accuracy([broken, says(0, 1, 2)], batches([0, 1, 2], 3))
    assert (result.right, result.total, result.unusable) == (2, 3, 1)
    assert result.count_differences(whole) == 1


def test_a_smaller_last_batch_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr("tocom_export.study.accuracy.time", clock)
    ticks = iter([2.0, 6.0, 100.0])

    def run(images: np.ndarray) -> np.ndarray:
        clock.now += next(ticks)
        return says(0, 0, 0, 0, 0)(images)

    (result,) = measure_accuracy([run], batches([0] * 5, 2))
    assert result.seconds == [1.5, 3.5]  # per image, with the tick of the clock
    assert result.throughput == pytest.approx(1 / 2.5)
    assert result.total == 5


def test_an_empty_batch_is_passed_over():
    calls: list[int] = []
    empty = (np.empty((0, 1, 1, 1)), np.empty(0))
    (result,) = measure_accuracy([says(0, 1)], [empty, *batches([0, 1], 2)], calls.append)
    assert (result.total, len(result.seconds)) == (2, 1)
    assert calls == [2]


def test_models_take_turns():
    order: list[str] = []

    def named(name: str):
        def run(images: np.ndarray) -> np.ndarray:
            order.append(name)
            return says(0, 0, 0, 0)(images)

        return run

    measure_accuracy([named("a"), named("b")], batches([0] * 4, 2))
    assert order == ["a", "b", "a", "b"]


def test_progress_is_told_in_images():
    told: list[int] = []
    measure_accuracy([says(*[0] * 5)], batches([0] * 5, 2), told.append)
    assert told == [2, 2, 1]


def test_throughput_is_the_median():
    assert Score(seconds=[0.1, 0.5, 0.2]).throughput == pytest.approx(5.0)


@pytest.mark.parametrize(
    "accuracy, images, low, high",
    [
        (80.0, 10, 49.016, 94.332),  # (0.8 + 1.92/10 ± 1.96 √(0.16/10 + 0.960/100)) / 1.3841
        (50.0, 10, 23.659, 76.341),
        (0.0, 10, 0.0, 27.753),  # z² / (10 + z²)
        (100.0, 10, 72.247, 100.0),
        (0.0, 1, 0.0, 79.345),
        (100.0, 1, 20.655, 100.0),
        (30.48, 10_000, 29.585, 31.390),
    ],
)
def test_the_interval_of_an_accuracy(accuracy: float, images: int, low: float, high: float):
    assert find_interval(accuracy, images) == pytest.approx((low, high), abs=1e-3)
    assert find_reach(accuracy, images) == pytest.approx(max(high - accuracy, accuracy - low), 1e-3)


@pytest.mark.parametrize("images", [1, 3, 7, 48, 10_000])
def test_an_interval_ends_where_accuracies_do(images: int):
    assert find_interval(0, images)[0] == 0
    assert find_interval(100, images)[1] == 100


def test_an_accuracy_for_people():
    assert format_accuracy(30.48, 10_000) == "30.48 ± 0.91 %"
    assert format_accuracy(100.0, 1) == "100.00 ± 79.35 %"
    assert format_accuracy(30.48, None) == "30.48 %"
    assert format_accuracy(None, 10) == "-"


@pytest.mark.parametrize(
    "gained, lost, images, points, low, high",
    [
        # (2.5 - 10.5) / 502 ± 1.96 √(13 - 8² / 502) / 502
        (2, 10, 500, -1.6, -2.9944, -0.1928),
        (0, 50, 10_000, -0.5, -0.6395, -0.3604),
        (50, 0, 10_000, 0.5, 0.3604, 0.6395),
        (40, 60, 10_000, -0.2, -0.3969, -0.0031),
        (0, 0, 500, 0.0, -0.3904, 0.3904),  # 1.96 / 502: agreement on a few says little
        (0, 0, 1, 0.0, -65.332, 65.332),
        (0, 1, 1, -100.0, -100.0, 51.010),
        (0, 20, 20, -100.0, -100.0, -75.953),
        (20, 0, 20, 100.0, 75.953, 100.0),
    ],
)
def test_the_interval_of_a_difference(
    gained: int, lost: int, images: int, points: float, low: float, high: float
):
    found = Difference(gained, lost, images)
    assert found.points == pytest.approx(points)
    assert found.interval == pytest.approx((low, high), abs=1e-3)


def test_the_images_that_one_of_two_gets_right():
    labels = [0, 1, 2, 3, 0]
    models = [says(0, 1, 0, 0, 1), says(1, 0, 2, 0, 2)]  # right: 1 1 0 0 0 and 0 0 1 0 0
    first, second = measure_accuracy(models, batches(labels, 2))
    assert first.compare(second) == Difference(2, 1, 5)
    assert second.compare(first) == Difference(1, 2, 5)
    assert first.compare(first) == Difference(0, 0, 5)
    assert first.interval == find_interval(40, 5)
    (other,) = measure_accuracy(models[:1], batches(labels, 3))
    with pytest.raises(ValueError):
        first.compare(other)


def test_a_pair_says_more_than_two_accuracies():
    """Two points apart, of some 300 images right: alone each is known to ± 5."""
    assert Difference(0, 10, 500).interval[1] < 0
    assert find_interval(60, 500)[1] > find_interval(62, 500)[0]

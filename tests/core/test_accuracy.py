from __future__ import annotations

import numpy as np
import pytest
import torch

from tocom_export.study.accuracy import Score, measure_accuracy


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

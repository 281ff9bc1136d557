"""What candidates are judged by, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tocom_export.engines.tuning.journal import Journal
from tocom_export.engines.tuning.objective import Objective
from tocom_export.study.divergence import find_distance, find_divergence


def test_divergence_is_kullback_leibler_s():
    wanted, logits = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    found = find_divergence(logits + 3, wanted - 7)  # logits are known up to a sum
    np.testing.assert_allclose(found, [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0], atol=1e-12)


def test_distance_is_by_direction():
    found = find_distance(
        np.array([[2.0, 0], [0, 3], [1, 1]]), np.array([[1.0, 0], [1, 0], [1, 1]])
    )
    np.testing.assert_allclose(found, [0, 1, 0], atol=1e-12)


def test_what_is_hopeless_is_given_up():
    images = np.zeros((64, 1, 1, 1), np.float32)
    wanted = np.tile([4.0, 0], (64, 1))
    seen: list[int] = []

    def run(part: np.ndarray) -> np.ndarray:
        seen.append(len(part))
        return np.tile([0.0, 4], (len(part), 1))

    objective = Objective(images, wanted, 16, True)
    whole = objective.judge(run)
    assert sum(seen) == 64
    seen.clear()
    assert objective.judge(run, whole / 10) == pytest.approx(whole)
    assert sum(seen) == 16
    seen.clear()
    objective.judge(run, whole)
    assert sum(seen) == 64


def test_labels_count_wrong_ones():
    wanted = np.zeros((4, 2))
    objective = Objective(np.zeros((4, 1, 1, 1), np.float32), wanted, 4, True, [0, 1, 0, 0])
    assert objective.judge(lambda x: np.array([[1.0, 0]] * 4)) == 0.25


def test_a_journal_is_continued_where_the_work_is_the_same(tmp_path: Path):
    file, found = tmp_path / "j", []

    def find(value: float) -> float:
        found.append(value)
        return value

    first = Journal(file, ["a", 1])
    assert [first.ask(["loss", [1, 2]], lambda: find(0.5)) for _ in range(2)] == [0.5, 0.5]
    first.ask("x", lambda: find(1.5))
    file.write_text(file.read_text() + '["broken off')
    again = Journal(file, ["a", 1])
    assert again.count == 2
    assert again.ask("x", lambda: find(9)) == 1.5
    assert found == [0.5, 1.5]
    assert Journal(file, ["a", 2]).count == 0
    again.remove()
    assert not file.exists()

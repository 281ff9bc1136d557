"""Who waits, who is taken together, and who is sent away."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from tocom_export.engines.serving.http.line import Line, Ticket, choose_batch
from tocom_export.engines.serving.http.refusals import Refusal


def ticket(count: int = 1, variant: str | None = None, **more: Any) -> Ticket:
    return Ticket(np.zeros((count, 3, 2, 2), np.float32), variant, lambda found: None, **more)


def test_alike_go_together_and_nobody_overtakes():
    waiting = [
        ticket(), ticket(variant="r08"), ticket(2), ticket(4), ticket(), ticket(variant="r08"),
    ]  # fmt: skip
    assert choose_batch(waiting, 8) == [waiting[0], *waiting[2:5]]
    assert choose_batch(waiting, 6) == [waiting[0], waiting[2]]  # not the last one, which fits
    assert choose_batch(waiting, 1) == [waiting[0]]
    assert choose_batch(waiting[1:], 8) == [waiting[1], waiting[5]]
    assert choose_batch([ticket(9)], 8)[0].count == 9
    assert choose_batch([], 8) == []


def test_room_is_for_images():
    line = Line(4)
    line.join(ticket(3))
    with pytest.raises(Refusal, match="too many requests wait") as caught:
        line.join(ticket(2))
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "1")
    line.join(ticket(1))
    assert len(line) == 4
    assert len(line.take(8)[0]) == 2
    assert len(line) == 0


def test_one_that_is_larger_than_the_line_is_let_in_alone():
    line = Line(2)
    line.join(ticket(3))
    with pytest.raises(Refusal):
        line.join(ticket(1))
    assert line.take(8)[0][0].count == 3


def test_who_is_late_is_not_run():
    line = Line(9)
    late, right = ticket(deadline=time.monotonic() - 1), ticket(deadline=time.monotonic() + 9)
    line.join(late)
    line.join(right)
    assert line.take(8) == ([right], [late])
    assert len(line) == 0


def test_who_leaves_is_forgotten():
    line = Line(9)
    first, second = ticket(2), ticket()
    line.join(first)
    line.join(second)
    assert line.leave(first)
    assert not line.leave(first)
    assert len(line) == 1
    assert line.take(8) == ([second], [])
    assert not line.leave(second)


def test_what_is_seen_of_it():
    line = Line(9)
    now = time.monotonic()
    line.join(ticket(2, "r08", arrived=now - 3))
    line.join(ticket(arrived=now - 1, deadline=now + 2))
    look = line.wait(1, 0, 0)
    np.testing.assert_allclose(look.waits, [3, 3, 1], atol=0.5)
    assert look.slacks(10) == pytest.approx([7, 7, 2], abs=0.5)
    assert look.slacks(2) == pytest.approx([-1, -1, 1], abs=0.5)


def test_nobody_comes():
    assert not Line(9).wait(8, 0, 0.01).waits


def test_a_short_wait_fills_a_batch():
    line = Line(9)
    line.join(ticket())

    def come() -> None:
        for _ in range(3):
            line.join(ticket())

    threading.Timer(0.05, come).start()
    start = time.monotonic()
    look = line.wait(4, 10.0, 1)
    assert len(look.waits) == 4
    assert time.monotonic() - start < 5


def test_the_wait_has_an_end():
    line = Line(9)
    line.join(ticket())
    start = time.monotonic()
    assert len(line.wait(4, 0.05, 1).waits) == 1
    assert time.monotonic() - start < 5


def test_who_waits_when_it_closes_is_sent_away():
    line = Line(9)
    waiting = ticket()
    line.join(waiting)
    assert line.close() == [waiting]
    assert line.wait(8, 0, 1) is None
    with pytest.raises(Refusal, match="stopping"):
        line.join(ticket())

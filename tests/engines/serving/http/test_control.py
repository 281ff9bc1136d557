"""What a policy is told, and what is made of what it says."""

from __future__ import annotations

import time

import pytest

from tocom_export.engines.serving.http.control import Control
from tocom_export.engines.serving.http.line import Look
from tocom_export.engines.serving.slackfit import SlackFit
from tocom_export.engines.serving.steering import Steering

SECONDS = {"r00": {1: 0.1, 8: 0.8}, "r16": {1: 0.02, 8: 0.1}}


def look(count: int, waited: float = 0.0) -> Look:
    return Look([waited] * count, [9.0] * count)


@pytest.mark.parametrize("policy", [Steering, SlackFit])
def test_load_lowers_and_rest_raises(policy):
    control = Control(policy(SECONDS, 0.5), "r00", 8)
    assert control.choose(look(1)) == 1
    assert control.variant == "r00"
    assert control.choose(look(30, 0.39)) > 1
    assert control.variant == "r16"
    until = time.monotonic() + 20
    while control.variant != "r00":
        assert time.monotonic() < until
        control.choose(Look())
        time.sleep(0.01)


def test_rest_is_no_request():
    control = Control(Steering(SECONDS, 0.5), "r00", 8)
    for _ in range(20):
        control.choose(Look())
        time.sleep(0.002)
    assert control._state.rate == 0


def test_who_was_left_waiting_didnt_come_again():
    control = Control(Steering(SECONDS, 0.5), "r00", 8)
    control.choose(look(6))
    control.note_taken(look(6), 2)
    time.sleep(0.01)
    control.choose(look(4))
    assert control._state.rate == 0
    time.sleep(0.01)
    control.note_taken(look(4), 4)
    control.choose(look(4))
    assert control._state.rate > 0


def test_deadlines_count():
    control = Control(Steering(SECONDS, 0.5), "r00", 8)
    control.choose(Look([0.0], [0.05]))
    assert control.variant == "r16"


def test_a_slower_machine_is_noticed():
    control = Control(Steering(SECONDS, 0.5), "r00", 8)
    for _ in range(50):
        control.observe("r16", 0.4, 8)
    control.choose(look(1))
    assert control.variant == "r16"


def test_without_a_policy():
    control = Control(None, "r08", 4)
    assert control.choose(look(30)) == 4
    control.observe("r08", 1.0, 1)
    control.note_taken(look(30), 4)
    assert control.variant == "r08"
    control.pinned = "r16"
    assert control.variant == "r16"

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest
import torch.nn.functional as F
from torch import Tensor

from tocom_export.errors import Stopped

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

STEPS = 9


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell has it ignored by what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step(make_run, number: signal.Signals):
    unbroken, run = make_run("unbroken"), make_run("run")
    unbroken.train()

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        if step == 4:
            signal.raise_signal(number)
        return F.cross_entropy(run.module(images), labels)

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught:
        run.train(loss_of=loss_of)
    assert signal.getsignal(number) is before
    assert caught.value.exit_status == 130
    assert str(caught.value) == f"Stopped after step 5 of {STEPS}; saved in {run.state}."
    again = make_run("run")
    again.train()
    assert again.losses == unbroken.losses[5:]


def test_a_second_ctrl_c_does_not_wait(make_run):
    run = make_run("run")

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train(loss_of=loss_of)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_leaves_signals_alone(make_run):
    run, before = make_run("run"), signal.getsignal(signal.SIGTERM)
    errors: list[BaseException] = []

    def train() -> None:
        try:
            run.train()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors
    assert len(run.losses) == STEPS
    assert signal.getsignal(signal.SIGTERM) is before

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tocom_export.errors import TocomError
from tocom_export.training.loop.distributed import Process
from tocom_export.training.loop.optimizer import Hyperparameters
from tocom_export.training.loop.state import StateFile

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

STEPS = 9


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("stops", "save_seconds"),
    [((1,), 0.0), ((4,), 0.0), ((2, 5, 7), 0.0), ((1,), 60.0), ((3,), 60.0), ((8,), 60.0)],
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    make_run, stops: tuple[int, ...], save_seconds: float
):
    unbroken = make_run("unbroken")
    unbroken.train()
    for stop in stops:
        make_run("broken").train(stop=stop, save_seconds=save_seconds)
    broken = make_run("broken")
    broken.train(save_seconds=save_seconds)
    for name, tensor in state_of(unbroken.module).items():
        assert torch.equal(tensor, broken.module.state_dict()[name]), name
    assert broken.losses == unbroken.losses[-len(broken.losses) :]
    logs = [run.state.with_suffix(".csv").read_text() for run in (broken, unbroken)]
    assert logs[0] == logs[1]


def test_only_steps_after_the_last_state_are_taken_again(make_run):
    make_run("run").train(stop=5)
    again = make_run("run")
    again.train()
    assert [step for step, _, _ in again.losses] == [4, 5, 6, 7, 8, 9]


def test_a_finished_run_is_not_trained_further(make_run):
    first = make_run("run")
    first.train()
    again = make_run("run")
    again.train()
    assert not again.losses
    for name, tensor in state_of(first.module).items():
        assert torch.equal(tensor, again.module.state_dict()[name])


def test_training_changes_the_weights_and_lowers_the_loss(make_run):
    run = make_run("run")
    before = state_of(run.module)
    run.train()
    assert all(not torch.equal(t, before[n]) for n, t in run.module.state_dict().items())
    assert run.losses[-1][1] < run.losses[0][1]


def test_frozen_weights_stay(make_run):
    run = make_run("run")
    run.module.blocks.requires_grad_(False)
    before = state_of(run.module)
    run.train()
    for name, tensor in run.module.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("blocks."), name


def test_the_log_has_a_line_per_step(make_run):
    run = make_run("run")
    run.train()
    lines = run.state.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "step,loss,lr"
    assert [line.split(",")[0] for line in lines[1:]] == [str(n) for n in range(1, STEPS + 1)]
    assert float(lines[5].split(",")[1]) == pytest.approx(run.losses[4][1], abs=1e-6)


def test_epochs_are_told(make_run):
    epochs: list[int] = []
    make_run("run").train(after_epoch=epochs.append)
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(make_run, value: float):
    run = make_run("run")
    calls: list[int] = []

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        calls.append(1)
        return run.module(images).mean() * (value if len(calls) == 5 else 1.0)

    before = None

    def after_epoch(_: int) -> None:
        nonlocal before
        before = run.state.read_bytes()

    with pytest.raises(TocomError) as caught:
        run.train(loss_of=loss_of, after_epoch=after_epoch)
    for part in (f"{value} at step 5 of {STEPS};", str(run.state), "`lr`", "`clip`"):
        assert part in str(caught.value)
    assert caught.value.exit_status == 1
    assert run.state.read_bytes() == before


def test_a_loss_that_is_not_finite_at_first_names_no_state(make_run):
    run = make_run("run")
    with pytest.raises(TocomError) as caught:
        run.train(loss_of=lambda images, *_: run.module(images).mean() * torch.nan)
    assert not run.state.exists()
    assert str(run.state) not in str(caught.value)


def test_no_files_but_the_state_and_the_log_are_left(make_run):
    run = make_run("run")
    run.train(save_seconds=0.0)
    found = {p.name for p in run.state.parent.iterdir()}
    assert found - {"run.tensorboard"} == {"run.csv", "run.state"}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_give_the_weights_of_one_batch(
    make_run, accumulate: int, hyperparameters: Hyperparameters
):
    changed = replace(hyperparameters, lr=1e-3, clip=None)
    whole, parts = make_run("whole"), make_run("parts")
    for run, count in ((whole, 1), (parts, accumulate)):
        run.module.eval()
        run.module.train = lambda mode=True: None  # without drop path, which is drawn per part
        run.train(changed, accumulate=count)
    start = state_of(make_run("start").module)
    for name, tensor in whole.module.state_dict().items():
        assert (tensor - parts.module.state_dict()[name]).abs().max() <= 1e-5, name
        assert (tensor - start[name]).abs().max() > 1e-4, name
    for (_, one, _), (_, other, _) in zip(whole.losses, parts.losses, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_parts_of_a_batch_draw_apart(make_run):
    run = make_run("run")
    drawn: list[float] = []

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        drawn.append(torch.rand(()).item())
        return run.module(images).mean()

    run.train(loss_of=loss_of, accumulate=2)
    assert len(drawn) == len(set(drawn)) == 2 * STEPS


def test_the_loss_is_told_its_step(make_run):
    run = make_run("run")
    steps: list[int] = []

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        steps.append(step)
        return run.module(images).mean()

    run.train(loss_of=loss_of, accumulate=2)
    assert steps == [step for step in range(STEPS) for _ in range(2)]


def test_mixed_labels_reach_the_loss(make_run):
    run = make_run("run")
    kinds: list[tuple[Any, Any]] = []

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        kinds.append((labels.shape, labels.dtype))
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(len(labels)))
        return F.cross_entropy(run.module(images), labels)

    run.train(loss_of=loss_of, data=run.data(mixup=0.8, cutmix=1.0))
    assert set(kinds) == {((4, 2), torch.float32)}


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_bf16_trains_to_finite_weights(make_run, mixup: float):
    run, exact = make_run("run"), make_run("exact")
    run.train(process=Process(amp=torch.bfloat16), data=run.data(mixup=mixup))
    exact.train(data=exact.data(mixup=mixup))
    assert {t.dtype for t in run.module.state_dict().values()} == {torch.float32}
    assert all(t.isfinite().all() for t in run.module.state_dict().values())
    (_, rough, _), (_, fine, _) = run.losses[0], exact.losses[0]
    assert rough != fine  # it did compute in bf16
    assert rough == pytest.approx(fine, rel=0.02)


def test_weights_that_are_not_finite_are_not_saved(make_run):
    run = make_run("run")

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        loss = F.cross_entropy(run.module(images), labels)
        if step < 4:
            return loss
        zero = (run.module.head.bias * 0).sum().nan_to_num()
        return loss.nan_to_num() + zero.abs().sqrt()  # finite, but the root's slope is 0 · ∞

    with pytest.raises(TocomError) as caught:
        run.train(loss_of=loss_of, save_seconds=0.0)
    message = str(caught.value)
    assert message.startswith("weights are NaN or Inf at step ")
    assert str(run.state) in message
    assert len(run.losses) >= 5
    assert all(t.isfinite().all() for t in torch.load(run.state)["module"].values())


class Clock:
    """Stands in for the loop's ``time``."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("cost", "save_seconds", "steps"),
    [
        (1.0, 0.0, [1, 3, 5, 7, 9]),  # a step takes 26 seconds, and 50 are due after each save
        (0.1, 0.0, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (0.1, 1000.0, [3, 6, 9]),  # cheap, so at the end of each epoch
        (1.0, 1000.0, [3, 9]),
    ],
)
def test_saving_takes_a_small_part_of_the_time(
    make_run, monkeypatch: pytest.MonkeyPatch, cost: float, save_seconds: float, steps: list[int]
):
    clock, saves = Clock(), []
    save = StateFile.save

    def slow(state: StateFile, step: int) -> None:
        clock.now += cost
        saves.append(step)
        save(state, step)

    def work(images: Tensor, labels: Tensor, step: int) -> Tensor:
        clock.now += 26.0
        return run.module(images).mean()

    monkeypatch.setattr("tocom_export.training.loop.loop.time", clock)
    monkeypatch.setattr(StateFile, "save", slow)
    run = make_run("run")
    run.train(loss_of=work, save_seconds=save_seconds)
    assert saves == steps

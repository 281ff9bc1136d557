from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tocom_export.errors import CheckpointError, TocomError
from tocom_export.images import Preprocess
from tocom_export.training.data import TrainData
from tocom_export.training.loop import Recipe, fit
from tocom_export.training.zoo import vit_from_spec

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

RECIPE = Recipe(epochs=3, batch=4, lr=1e-2, warmup_epochs=1, clip=1.0)
STEPS = 9


class Stop(Exception):
    """Stands in for a killed process."""


class Run:
    """A tiny training run with drop path, so that random draws matter."""

    def __init__(self, folder: Path, images: Path, spec: Any) -> None:
        self.state = folder / "run.state"
        self.data = TrainData(images, spec, Preprocess(), 4, augment="rand-m9", erasing=0.5)
        torch.manual_seed(7)
        self.module = vit_from_spec(spec, drop_path=0.3)
        self.losses: list[tuple[int, float, float]] = []

    def fit(self, recipe: Recipe = RECIPE, stop: int | None = None, **options: Any) -> None:
        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.module(images), labels)

        def report(step: int, total: int, loss: float, lr: float) -> None:
            assert total == STEPS
            self.losses.append((step, loss, lr))
            if step == stop:
                raise Stop

        options.setdefault("loss_of", loss_of)
        options.setdefault("identity", {})
        fit(self.module, data=self.data, recipe=recipe, state_file=self.state, report=report,
            **options)  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path, image_folder: Callable[..., Path], make_spec) -> Callable[[str], Run]:
    spec = make_spec(image_size=[16, 16], width=16, heads=2, depth=2, mlp_width=32, classes=2)
    images = image_folder(tmp_path / "images")

    def make(name: str) -> Run:
        (tmp_path / name).mkdir(exist_ok=True)
        return Run(tmp_path / name, images, spec)

    return make


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
    unbroken.fit()
    for stop in stops:
        with pytest.raises(Stop):
            make_run("broken").fit(stop=stop, save_seconds=save_seconds)
    broken = make_run("broken")
    broken.fit(save_seconds=save_seconds)
    for name, tensor in state_of(unbroken.module).items():
        assert torch.equal(tensor, broken.module.state_dict()[name]), name
    assert broken.losses == unbroken.losses[-len(broken.losses) :]
    logs = [run.state.with_suffix(".csv").read_text() for run in (broken, unbroken)]
    assert logs[0] == logs[1]


def test_only_steps_after_the_last_state_are_taken_again(make_run):
    with pytest.raises(Stop):
        make_run("run").fit(stop=5)
    again = make_run("run")
    again.fit()
    assert [step for step, _, _ in again.losses] == [4, 5, 6, 7, 8, 9]


def test_a_finished_run_is_not_trained_further(make_run):
    first = make_run("run")
    first.fit()
    again = make_run("run")
    again.fit()
    assert not again.losses
    for name, tensor in state_of(first.module).items():
        assert torch.equal(tensor, again.module.state_dict()[name])


def test_training_changes_the_weights_and_lowers_the_loss(make_run):
    run = make_run("run")
    before = state_of(run.module)
    run.fit()
    assert all(not torch.equal(t, before[n]) for n, t in run.module.state_dict().items())
    assert run.losses[-1][1] < run.losses[0][1]


def test_frozen_weights_stay(make_run):
    run = make_run("run")
    run.module.blocks.requires_grad_(False)
    before = state_of(run.module)
    run.fit()
    for name, tensor in run.module.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("blocks."), name


def test_the_learning_rate_falls_from_its_peak_to_zero(make_run):
    run = make_run("run")
    run.fit(replace(RECIPE, warmup_epochs=0))
    rates = [lr for _, _, lr in run.losses]
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 5e-4


def test_the_learning_rate_rises_during_warm_up(make_run):
    run = make_run("run")
    run.fit()
    rates = [lr for _, _, lr in run.losses]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[:4] == sorted(rates[:4])
    assert 5e-3 < max(rates) == rates[3] <= 1e-2
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_the_log_has_a_line_per_step(make_run):
    run = make_run("run")
    run.fit()
    lines = run.state.with_suffix(".csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [str(n) for n in range(1, STEPS + 1)]
    assert float(lines[4].split(",")[1]) == pytest.approx(run.losses[4][1], abs=1e-6)


def test_epochs_are_told(make_run):
    epochs: list[int] = []
    make_run("run").fit(after_epoch=epochs.append)
    assert epochs == [1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(make_run, value: float):
    run = make_run("run")
    calls: list[int] = []

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return run.module(images).mean() * (value if len(calls) == 5 else 1.0)

    before = None

    def after_epoch(_: int) -> None:
        nonlocal before
        before = run.state.read_bytes()

    with pytest.raises(TocomError) as caught:
        run.fit(loss_of=loss_of, after_epoch=after_epoch)
    for part in (str(value), "step 4", str(STEPS), str(run.state)):
        assert part in str(caught.value)
    assert caught.value.exit_status == 1
    assert run.state.read_bytes() == before


def test_a_loss_that_is_not_finite_at_first_names_no_state(make_run):
    run = make_run("run")
    with pytest.raises(TocomError) as caught:
        run.fit(loss_of=lambda images, _: run.module(images).mean() * torch.nan)
    assert not run.state.exists()
    assert str(run.state) not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"lr": 1e-3}, {"epochs": 4}, {"seed": 1}, {"clip": None}, {"batch": 5}]
)
def test_a_state_of_another_recipe_is_refused(make_run, changes: dict):
    with pytest.raises(Stop):
        make_run("run").fit(stop=4)
    before = make_run("run").state.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        make_run("run").fit(replace(RECIPE, **changes))
    run = make_run("run")
    assert str(run.state) in str(caught.value)
    assert "recipe" in str(caught.value)
    assert run.state.read_bytes() == before


def test_a_state_of_another_model_is_refused(make_run):
    with pytest.raises(Stop):
        make_run("run").fit(stop=4)
    run = make_run("run")
    run.module.head = nn.Linear(16, 3)
    with pytest.raises(CheckpointError, match="model"):
        run.fit()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_state_is_refused(make_run, share: float):
    with pytest.raises(Stop):
        make_run("run").fit(stop=4)
    run = make_run("run")
    raw = run.state.read_bytes()
    run.state.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError) as caught:
        run.fit()
    assert str(run.state) in str(caught.value)


@pytest.mark.parametrize("raw", [b"no state", b"\x80\x04.", b"PK\x03\x04"])
def test_a_file_that_is_no_state_is_refused(make_run, raw: bytes):
    run = make_run("run")
    run.state.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        run.fit()
    assert str(run.state) in str(caught.value)


@pytest.mark.parametrize("content", [[1], {"step": 3}, {"fingerprint": "x"}, torch.ones(2)])
def test_a_state_of_something_else_is_refused(make_run, content: Any):
    run = make_run("run")
    torch.save(content, run.state)
    with pytest.raises(CheckpointError) as caught:
        run.fit()
    assert str(run.state) in str(caught.value)


def test_no_files_but_the_state_and_the_log_are_left(make_run):
    run = make_run("run")
    run.fit(save_seconds=0.0)
    assert sorted(p.name for p in run.state.parent.iterdir()) == ["run.csv", "run.state"]

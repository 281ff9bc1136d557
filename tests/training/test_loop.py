from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tocom_export.errors import CheckpointError, InputError, TocomError
from tocom_export.model.preprocess import Preprocess
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.train import TrainData
from tocom_export.training.loop.distributed import Placement
from tocom_export.training.loop.loop import Recipe, Stopped, fit
from tocom_export.training.loop.state import StateFile
from tocom_export.training.timm_models import vit_from_spec

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
        self._images, self._spec = images, spec
        torch.manual_seed(7)
        self.module = vit_from_spec(spec, drop_path=0.3)
        self.losses: list[tuple[int, float, float]] = []

    def fit(self, recipe: Recipe = RECIPE, stop: int | None = None, **options: Any) -> None:
        def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
            return F.cross_entropy(self.module(images), labels)

        def report(step: int, total: int, loss: float, lr: float) -> None:
            assert total == STEPS
            self.losses.append((step, loss, lr))
            if step == stop:
                raise Stop

        options.setdefault("loss_of", loss_of)
        options.setdefault("identity", {})
        options.setdefault("data", self.data(recipe))
        fit(self.module, recipe=recipe, state_file=self.state, report=report, **options)

    def data(self, recipe: Recipe = RECIPE, **options: Any) -> TrainData:
        options = {"augment": "rand-m9", "erasing": 0.5, **options}
        images = open_images(self._images)
        return TrainData(
            images, self._spec, Preprocess(), recipe.batch, seed=recipe.seed, **options
        )


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
    assert max(rates) == rates[3] == 1e-2
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_the_log_has_a_line_per_step(make_run):
    run = make_run("run")
    run.fit()
    lines = run.state.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "step,loss,lr"
    assert [line.split(",")[0] for line in lines[1:]] == [str(n) for n in range(1, STEPS + 1)]
    assert float(lines[5].split(",")[1]) == pytest.approx(run.losses[4][1], abs=1e-6)


def test_epochs_are_told(make_run):
    epochs: list[int] = []
    make_run("run").fit(after_epoch=epochs.append)
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
        run.fit(loss_of=loss_of, after_epoch=after_epoch)
    for part in (f"{value} at step 5 of {STEPS};", str(run.state), "--lr", "--clip"):
        assert part in str(caught.value)
    assert caught.value.exit_status == 1
    assert run.state.read_bytes() == before


def test_a_loss_that_is_not_finite_at_first_names_no_state(make_run):
    run = make_run("run")
    with pytest.raises(TocomError) as caught:
        run.fit(loss_of=lambda images, *_: run.module(images).mean() * torch.nan)
    assert not run.state.exists()
    assert str(run.state) not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 1e-3}, "lr 0.01 there, 0.001 here"),
        ({"epochs": 4}, "epochs 3 there, 4 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"clip": None}, "clip 1.0 there, null here"),
        ({"batch": 5}, "batch 4 there, 5 here"),
        ({"weight_decay": 0.0}, "weight_decay 0.05 there, 0.0 here"),
    ],
)
def test_a_state_of_another_recipe_is_refused(make_run, changes: dict, words: str):
    with pytest.raises(Stop):
        make_run("run").fit(stop=4)
    before = make_run("run").state.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        make_run("run").fit(replace(RECIPE, **changes))
    run = make_run("run")
    assert str(caught.value).startswith(f"{run.state} is of a run with another recipe ({words}).")
    assert run.state.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augment": "none"}, '(augment "rand-m9" there, "none" here)'),
        ({"mixup": 0.8}, "(mixup 0.0 there, 0.8 here)"),
        ({"flip": False, "erasing": 0.1}, "(flip true there, false here; erasing 0.5 there, 0.1"),
    ],
)
def test_a_state_of_other_data_is_refused(make_run, changes: dict, words: str):
    with pytest.raises(Stop):
        make_run("run").fit(stop=4)
    run = make_run("run")
    with pytest.raises(CheckpointError) as caught:
        run.fit(data=run.data(**changes))
    assert words in str(caught.value)


def test_a_state_of_another_precision_is_refused(make_run):
    with pytest.raises(Stop):
        make_run("run").fit(stop=4)
    with pytest.raises(CheckpointError, match=r'amp "None" there, "torch\.bfloat16" here'):
        make_run("run").fit(placement=Placement(amp=torch.bfloat16))


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
    found = {p.name for p in run.state.parent.iterdir()}
    assert found - {"run.tensorboard"} == {"run.csv", "run.state"}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_give_the_weights_of_one_batch(make_run, accumulate: int):
    recipe = replace(RECIPE, lr=1e-3, clip=None)
    whole, parts = make_run("whole"), make_run("parts")
    for run, count in ((whole, 1), (parts, accumulate)):
        run.module.eval()
        run.module.train = lambda mode=True: None  # without drop path, which is drawn per part
        run.fit(recipe, accumulate=count)
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

    run.fit(loss_of=loss_of, accumulate=2)
    assert len(drawn) == len(set(drawn)) == 2 * STEPS


def test_the_loss_is_told_its_step(make_run):
    run = make_run("run")
    steps: list[int] = []

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        steps.append(step)
        return run.module(images).mean()

    run.fit(loss_of=loss_of, accumulate=2)
    assert steps == [step for step in range(STEPS) for _ in range(2)]


def test_mixed_labels_reach_the_loss(make_run):
    run = make_run("run")
    kinds: list[tuple[Any, Any]] = []

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        kinds.append((labels.shape, labels.dtype))
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(len(labels)))
        return F.cross_entropy(run.module(images), labels)

    run.fit(loss_of=loss_of, data=run.data(mixup=0.8, cutmix=1.0))
    assert set(kinds) == {((4, 2), torch.float32)}


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_bf16_trains_to_finite_weights(make_run, mixup: float):
    run, exact = make_run("run"), make_run("exact")
    run.fit(placement=Placement(amp=torch.bfloat16), data=run.data(mixup=mixup))
    exact.fit(data=exact.data(mixup=mixup))
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
        run.fit(loss_of=loss_of, save_seconds=0.0)
    message = str(caught.value)
    assert message.startswith("weights that are not finite at step ")
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
    run.fit(loss_of=work, save_seconds=save_seconds)
    assert saves == steps


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 GB."),
    ],
)
def test_out_of_memory_says_what_to_lower(make_run, error: RuntimeError):
    run = make_run("run")

    def loss_of(*_: Any) -> Tensor:
        raise error

    with pytest.raises(InputError) as caught:
        run.fit(loss_of=loss_of, accumulate=2)
    for part in ("--batch 4 --accumulate 2;", "lower --batch", "--accumulate 4", "--amp bf16"):
        assert part in str(caught.value)
    assert caught.value.__cause__ is error


def test_other_runtime_errors_pass_unchanged(make_run):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def loss_of(*_: Any) -> Tensor:
        raise error

    with pytest.raises(RuntimeError) as caught:
        make_run("run").fit(loss_of=loss_of)
    assert caught.value is error


def test_sigterm_saves_after_the_step(make_run):
    unbroken, run = make_run("unbroken"), make_run("run")
    unbroken.fit()

    def loss_of(images: Tensor, labels: Tensor, step: int) -> Tensor:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return F.cross_entropy(run.module(images), labels)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught:
        run.fit(loss_of=loss_of)
    assert signal.getsignal(signal.SIGTERM) is before
    assert caught.value.exit_status == 0
    assert str(caught.value) == f"Stopped after step 5 of {STEPS}; saved in {run.state}."
    again = make_run("run")
    again.fit()
    assert again.losses == unbroken.losses[5:]


def test_a_thread_leaves_signals_alone(make_run):
    run, before = make_run("run"), signal.getsignal(signal.SIGTERM)
    errors: list[BaseException] = []

    def train() -> None:
        try:
            run.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors
    assert len(run.losses) == STEPS
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("warmup", [3, 4])
def test_a_warm_up_of_all_epochs_is_refused(warmup: int):
    with pytest.raises(InputError, match=f"--warmup {warmup}: fewer than the 3 --epochs"):
        Recipe(3, 4, 1e-2, warmup_epochs=warmup)

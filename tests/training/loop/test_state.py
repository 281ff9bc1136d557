from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tocom_export.errors import CheckpointError, OutputError
from tocom_export.training.loop.distributed import Process
from tocom_export.training.loop.optimizer import Hyperparameters
from tocom_export.training.loop.state import StateFile, hash_weights, locate_state

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

RECIPE = {"lr": 1e-3, "augment": "crop", "weights": "a" * 64, "classes": list("abc")}


def module(value: float) -> nn.Linear:
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, value)
    return linear


def state(file: Path, part: nn.Module, **changes: Any) -> StateFile:
    return StateFile(file, {"module": part}, {**RECIPE, **changes})


def test_what_is_saved_is_resumed(tmp_path: Path):
    state(tmp_path / "run.state", module(3.0)).save(7)
    other = module(0.0)
    assert state(tmp_path / "run.state", other).resume() == 7
    assert (other.weight == 3.0).all()


def test_without_a_file_there_is_nothing_to_resume(tmp_path: Path):
    other = module(2.0)
    assert state(tmp_path / "run.state", other).resume() == 0
    assert (other.weight == 2.0).all()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 2e-3}, "lr 0.001 there, 0.002 here"),
        ({"augment": "none"}, 'augment "crop" there, "none" here'),
        ({"augment": None}, 'augment "crop" there, null here'),
        ({"augment": "other"}, 'augment "crop" there, "other" here'),
        ({"weights": "b" * 64}, "weights"),
        ({"weights": None}, "weights"),
        ({"lr": 1, "weights": ""}, "lr 0.001 there, 1 here; weights"),
        ({"method": "tome"}, 'method null there, "tome" here'),
        ({"classes": ["a"]}, 'classes ["a", "b", "c"] there, ["a"] here'),
    ],
)
def test_what_differs_is_named(tmp_path: Path, changes: dict, words: str):
    file = tmp_path / "run.state"
    state(file, module(3.0)).save(7)
    other = module(0.0)
    with pytest.raises(CheckpointError) as caught:
        state(file, other, **changes).resume()
    assert str(caught.value) == (
        f"{file} is of a run with another recipe ({words}). Give the options it was started with, "
        "remove it, or name another `out`."
    )
    assert (other.weight == 0.0).all()


def test_what_only_the_saved_recipe_has_is_named(tmp_path: Path):
    state(tmp_path / "run.state", module(3.0), scale=0.1).save(7)
    with pytest.raises(CheckpointError, match=r"\(scale 0\.1 there, null here\)"):
        state(tmp_path / "run.state", module(0.0)).resume()


def test_tuples_are_as_good_as_lists(tmp_path: Path):
    state(tmp_path / "run.state", module(3.0), classes=("a", "b", "c")).save(1)
    assert state(tmp_path / "run.state", module(0.0)).resume() == 1


def test_a_failed_save_leaves_the_former_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "run.state"
    state(file, module(3.0)).save(7)
    before = file.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match="the disk is full"):
            state(file, module(4.0)).save(8)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_the_digest_knows_every_weight():
    first = module(1.0)
    before = hash_weights(first)
    same = module(0.0)
    same.load_state_dict(first.state_dict())
    assert hash_weights(same) == before
    with torch.no_grad():
        first.bias[1] += 1e-6
    assert hash_weights(first) != before


def test_the_state_lies_beside_the_result():
    assert locate_state(Path("a/bank.safetensors")) == Path("a/bank.safetensors.state")


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
def test_a_state_of_another_recipe_is_refused(
    make_run, changes: dict, words: str, hyperparameters: Hyperparameters
):
    make_run("run").train(stop=4)
    before = make_run("run").state.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        make_run("run").train(replace(hyperparameters, **changes))
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
    make_run("run").train(stop=4)
    run = make_run("run")
    with pytest.raises(CheckpointError) as caught:
        run.train(data=run.data(**changes))
    assert words in str(caught.value)


def test_a_state_of_another_precision_is_refused(make_run):
    make_run("run").train(stop=4)
    with pytest.raises(CheckpointError, match=r'amp "None" there, "torch\.bfloat16" here'):
        make_run("run").train(process=Process(amp=torch.bfloat16))


def test_a_state_of_another_model_is_refused(make_run):
    make_run("run").train(stop=4)
    run = make_run("run")
    run.module.head = nn.Linear(16, 3)
    with pytest.raises(CheckpointError, match="model"):
        run.train()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_state_is_refused(make_run, share: float):
    make_run("run").train(stop=4)
    run = make_run("run")
    raw = run.state.read_bytes()
    run.state.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError) as caught:
        run.train()
    assert str(run.state) in str(caught.value)


@pytest.mark.parametrize("raw", [b"no state", b"\x80\x04.", b"PK\x03\x04"])
def test_a_file_that_is_no_state_is_refused(make_run, raw: bytes):
    run = make_run("run")
    run.state.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        run.train()
    assert str(run.state) in str(caught.value)


@pytest.mark.parametrize("content", [[1], {"step": 3}, {"fingerprint": "x"}, torch.ones(2)])
def test_a_state_of_something_else_is_refused(make_run, content: Any):
    run = make_run("run")
    torch.save(content, run.state)
    with pytest.raises(CheckpointError) as caught:
        run.train()
    assert str(run.state) in str(caught.value)

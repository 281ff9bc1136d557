from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tocom_export.errors import CheckpointError, OutputError
from tocom_export.training.loop.state import StateFile, digest, state_of

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
        "remove it, or name another --out."
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
        with pytest.raises(OutputError, match="No space left"):
            state(file, module(4.0)).save(8)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_the_digest_knows_every_weight():
    first = module(1.0)
    before = digest(first)
    same = module(0.0)
    same.load_state_dict(first.state_dict())
    assert digest(same) == before
    with torch.no_grad():
        first.bias[1] += 1e-6
    assert digest(first) != before


def test_the_state_lies_beside_the_result():
    assert state_of(Path("a/bank.safetensors")) == Path("a/bank.safetensors.state")

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tocom_export.bank import FACTORS, ToComBank
from tocom_export.errors import CheckpointError
from tocom_export.images import Preprocess
from tocom_export.method import Method
from tocom_export.spec import VitSpec
from tocom_export.training.data import TrainData, seed_all
from tocom_export.training.distill import distill, distill_loss, draw_degrees
from tocom_export.training.loop import Recipe
from tocom_export.training.lowrank import TrainableBank
from tocom_export.training.model import CompressedVit

RECIPE = Recipe(epochs=3, batch=4, lr=1e-2)  # 3 steps an epoch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(image_size=(32, 32), depth=2)


@pytest.fixture
def model(spec: VitSpec, make_vit: Callable) -> CompressedVit:
    return CompressedVit(make_vit(spec)).eval()


@pytest.fixture
def images(spec: VitSpec, make_images: Callable) -> torch.Tensor:
    return torch.from_numpy(make_images(spec, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture
def run(spec: VitSpec, folder: Path, make_vit: Callable) -> Callable[..., ToComBank]:
    """Distil from the start, or from where the state beside ``out`` left off."""

    def call(out: Path, recipe: Recipe = RECIPE, report: Callable | None = None) -> ToComBank:
        data = TrainData(folder, spec, Preprocess(), recipe.batch)
        seed_all(0)
        bank = TrainableBank(spec, Method("tome"))
        return distill(CompressedVit(make_vit(spec)), bank, data, recipe, out, report=report)

    return call


def test_degrees_are_drawn_uniformly_and_differ():
    torch.manual_seed(0)
    draws = Counter(draw_degrees() for _ in range(27_200))
    assert set(draws) == {(m, n) for m in range(17) for n in range(17) if m != n}
    expected = 27_200 / (17 * 16)  # 100 of each pair
    chi_square = sum((n - expected) ** 2 / expected for n in draws.values())
    assert chi_square < 360  # 271 degrees of freedom; more than that once in 4000


def test_draws_follow_torchs_generator():
    torch.manual_seed(3)
    first = [draw_degrees() for _ in range(5)]
    torch.manual_seed(3)
    assert [draw_degrees() for _ in range(5)] == first


def test_the_loss_is_zero_where_student_and_teacher_agree(
    model: CompressedVit, spec: VitSpec, images: torch.Tensor
):
    untrained = TrainableBank(spec, Method("tome"))
    assert distill_loss(model, untrained, images, 5, 5).item() == pytest.approx(0, abs=1e-6)
    assert distill_loss(model, untrained, images, 0, 8).item() > 1e-4


@pytest.mark.parametrize("source, target", [(0, 8), (8, 0), (4, 2)])
def test_the_loss_is_the_divergence_from_the_source_to_the_compensated_target(
    model: CompressedVit, spec: VitSpec, images: torch.Tensor, make_bank: Callable,
    source: int, target: int,
):  # fmt: skip
    bank = TrainableBank.from_bank(make_bank(spec), spec)
    loss = distill_loss(model, bank, images, source, target)
    with torch.no_grad():
        teacher = F.softmax(model(images, source).double(), dim=-1)
        student = F.softmax(model(images, target, bank.side(source, target)).double(), dim=-1)
    wanted = (teacher * (teacher.log() - student.log())).sum(dim=-1).mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)


def test_only_the_bank_gets_gradients(
    model: CompressedVit, spec: VitSpec, images: torch.Tensor, make_bank: Callable
):
    bank = TrainableBank.from_bank(make_bank(spec), spec)
    model.requires_grad_(False)
    distill_loss(model, bank, images, 2, 9).backward()
    assert all(p.grad is None for p in model.parameters())
    for factor in (bank.down, bank.up):
        groups = factor.grad.abs().sum(dim=(0, 1, 3, 4)) > 0
        assert groups.nonzero().flatten().tolist() == list(range(2, 9))


def test_the_model_stays_as_it_is(
    model: CompressedVit, spec: VitSpec, folder: Path, tmp_path: Path
):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    bank = TrainableBank(spec, Method("tome"))
    data = TrainData(folder, spec, Preprocess(), 4)
    distill(model, bank, data, RECIPE, tmp_path / "bank.safetensors")
    assert not any(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_few_steps_lower_the_loss(model: CompressedVit, spec: VitSpec, images: torch.Tensor):
    torch.manual_seed(0)
    model.requires_grad_(False)
    bank = TrainableBank(spec, Method("tome"), dropout=0.0)
    optimizer = torch.optim.AdamW(bank.parameters(), lr=1e-2)
    first = distill_loss(model, bank, images, 0, 8).item()
    for _ in range(15):
        optimizer.zero_grad()
        distill_loss(model, bank, images, 0, 8).backward()
        optimizer.step()
    assert distill_loss(model, bank, images, 0, 8).item() < 0.8 * first


def test_the_bank_is_written_and_the_state_removed(run: Callable[..., ToComBank], tmp_path: Path):
    steps = []
    trained = run(tmp_path / "bank.safetensors", report=lambda *step: steps.append(step))
    assert [(step, total) for step, total, _, _ in steps] == [(n, 9) for n in range(1, 10)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bank.safetensors",
        "bank.safetensors.csv",
    ]
    loaded = ToComBank.load(tmp_path / "bank.safetensors")
    assert loaded.model == "small"
    for name in FACTORS:
        np.testing.assert_array_equal(loaded.factors()[name], trained.factors()[name])
        assert loaded.factors()[name].any()


@pytest.mark.parametrize("stop", [5, 7, 9])
def test_an_interrupted_run_gives_the_same_bank(
    run: Callable[..., ToComBank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
):
    def interrupt(step: int, *_: float) -> None:
        if step == stop:
            raise KeyboardInterrupt

    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    run(whole)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        clock = count(step=100)  # so that every step is saved
        patched.setattr(
            "tocom_export.training.loop.time", SimpleNamespace(monotonic=lambda: next(clock))
        )
        run(broken, report=interrupt)
    assert not broken.exists()
    assert broken.with_suffix(".safetensors.state").exists()

    steps = []
    run(broken, report=lambda step, *_: steps.append(step))
    assert steps == list(range(stop, 10))
    assert broken.read_bytes() == whole.read_bytes()
    assert (
        broken.with_suffix(".safetensors.csv").read_text()
        == whole.with_suffix(".safetensors.csv").read_text()
    )


def test_a_state_of_another_recipe(run: Callable[..., ToComBank], tmp_path: Path):
    def interrupt(step: int, *_: float) -> None:
        if step == 4:  # after the first epoch, which is saved
            raise KeyboardInterrupt

    out = tmp_path / "bank.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(out, report=interrupt)
    with pytest.raises(
        CheckpointError, match=r"bank\.safetensors\.state is of a run with another recipe"
    ):
        run(out, Recipe(epochs=3, batch=4, lr=1e-3))
    assert not out.exists()
    assert out.with_suffix(".safetensors.state").exists()


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04"])
def test_a_state_that_is_none(run: Callable[..., ToComBank], tmp_path: Path, content: bytes):
    out = tmp_path / "bank.safetensors"
    out.with_suffix(".safetensors.state").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bank\.safetensors\.state is not a training state"):
        run(out)


def test_a_state_of_other_weights(
    tmp_path: Path, spec: VitSpec, make_vit, image_folder: Callable[..., Path]
):
    folder = image_folder(tmp_path / "images", each=8)
    data = TrainData(folder, spec, Preprocess(), 4)

    def run(seed: int, report: Any = None) -> None:
        model = CompressedVit(make_vit(spec, seed))
        bank = TrainableBank(spec, Method("tome"))
        distill(model, bank, data, Recipe(2, 4, 1e-3), tmp_path / "b.safetensors", report=report)

    def stop(step: int, *_: Any) -> None:
        if step == 5:  # the first epoch is saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(0, stop)
    with pytest.raises(CheckpointError, match="another recipe, model or data"):
        run(1)

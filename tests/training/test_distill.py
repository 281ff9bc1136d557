from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tocom_export.compression.bank import FACTORS, ToComBank
from tocom_export.compression.method import Method
from tocom_export.errors import CheckpointError, InputError
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.seeding import seed_all
from tocom_export.training.data.train import TrainData
from tocom_export.training.distill import check_loss, distill, distill_loss, draw_degrees
from tocom_export.training.loop.distributed import Process
from tocom_export.training.loop.optimizer import Hyperparameters
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit

HYPERPARAMETERS = Hyperparameters(epochs=3, batch=4, lr=1e-2)  # 3 steps an epoch


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture
def run(spec: VitSpec, folder: Path, make_vit: Callable) -> Callable[..., ToComBank]:
    """Distil from the start, or from where the state beside ``out`` left off."""

    def call(
        out: Path, hyperparameters: Hyperparameters = HYPERPARAMETERS, **options: Any
    ) -> ToComBank:
        data = TrainData(
            open_images(folder),
            spec,
            Preprocess(),
            hyperparameters.batch,
            seed=hyperparameters.seed,
        )
        seed_all(0)
        names = ("arithmetic", "scale", "dropout")
        bank = TrainableBank(
            spec, Method("tome"), **{n: options.pop(n) for n in names if n in options}
        )
        return distill(CompressedVit(make_vit(spec)), bank, data, hyperparameters, out, **options)

    return call


def interrupt_at(stop: int) -> Callable[..., None]:
    """A report that ends the run like a user at the keyboard."""

    def report(step: int, *_: float) -> None:
        if step == stop:
            raise KeyboardInterrupt

    return report


def test_degrees_are_drawn_uniformly_and_differ():
    draws = Counter(draw_degrees(0, step) for step in range(27_200))
    assert set(draws) == {(m, n) for m in range(17) for n in range(17) if m != n}
    expected = 27_200 / (17 * 16)  # 100 of each pair
    chi_square = sum((n - expected) ** 2 / expected for n in draws.values())
    assert chi_square < 360  # 271 degrees of freedom; more than that once in 4000


def test_draws_follow_the_key_alone():
    torch.manual_seed(3)
    first = [draw_degrees(5, step) for step in range(20)]
    torch.manual_seed(4)
    np.random.seed(4)
    assert [draw_degrees(5, step) for step in range(20)] == first
    assert [draw_degrees(6, step) for step in range(20)] != first


def test_a_run_draws_the_degrees_of_seed_and_step(
    run: Callable[..., ToComBank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn = []
    loss = distill_loss

    def spy(model, bank, images, source, target, **options):
        drawn.append((source, target))
        return loss(model, bank, images, source, target, **options)

    monkeypatch.setattr("tocom_export.training.distill.distill_loss", spy)
    run(tmp_path / "bank.safetensors", replace(HYPERPARAMETERS, seed=3), accumulate=2)
    assert drawn == [draw_degrees(3, step) for step in range(9) for _ in range(2)]


def test_the_model_stays_as_it_is(
    model: CompressedVit, spec: VitSpec, folder: Path, tmp_path: Path
):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    bank = TrainableBank(spec, Method("tome"))
    data = TrainData(open_images(folder), spec, Preprocess(), 4)
    distill(model, bank, data, HYPERPARAMETERS, tmp_path / "bank.safetensors")
    assert not any(p.requires_grad for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_bank_is_written_and_the_state_removed(run: Callable[..., ToComBank], tmp_path: Path):
    steps = []
    trained = run(tmp_path / "bank.safetensors", report=lambda *step: steps.append(step))
    assert [(step, total) for step, total, _, _ in steps] == [(n, 9) for n in range(1, 10)]
    found = {p.name for p in tmp_path.iterdir()}
    assert found - {"bank.safetensors.tensorboard"} == {"bank.safetensors", "bank.safetensors.csv"}
    loaded = ToComBank.load(tmp_path / "bank.safetensors")
    assert loaded.model == "small"
    for name in FACTORS:
        np.testing.assert_array_equal(loaded.factors()[name], trained.factors()[name])
        assert loaded.factors()[name].any()


@pytest.mark.parametrize("stop", [5, 7, 9])
def test_an_interrupted_run_gives_the_same_bank(
    run: Callable[..., ToComBank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    run(whole)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        clock = (100**n for n in count())  # so that every step is saved, however long that takes
        patched.setattr(
            "tocom_export.training.loop.loop.time", SimpleNamespace(monotonic=lambda: next(clock))
        )
        run(broken, report=interrupt_at(stop))
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


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"lr": 1e-3}, {}, "lr 0.01 there, 0.001 here"),
        ({"epochs": 2}, {}, "epochs 3 there, 2 here"),
        ({}, {"loss": "features"}, 'loss "kl" there, "features" here'),
        ({}, {"scale": 0.2}, "scale 0.1 there, 0.2 here"),
        ({}, {"dropout": 0.0}, "dropout 0.1 there, 0.0 here"),
    ],
)
def test_a_state_of_another_recipe(
    run: Callable[..., ToComBank], tmp_path: Path, changes: dict, options: dict, words: str
):
    out = tmp_path / "bank.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(out, report=interrupt_at(4))  # after the first epoch, which is saved
    with pytest.raises(CheckpointError) as caught:
        run(out, replace(HYPERPARAMETERS, **changes), **options)
    state = out.with_suffix(".safetensors.state")
    assert f"{state} is of a run with another recipe ({words})." in str(caught.value)
    assert not out.exists()
    assert state.exists()


def test_a_state_of_another_arithmetic(run: Callable[..., ToComBank], tmp_path: Path):
    out = tmp_path / "bank.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(out, report=interrupt_at(4))
    with pytest.raises(CheckpointError, match='arithmetic "steps" there, "shared" here'):
        run(out, arithmetic="shared")


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04"])
def test_a_state_that_is_none(run: Callable[..., ToComBank], tmp_path: Path, content: bytes):
    out = tmp_path / "bank.safetensors"
    out.with_suffix(".safetensors.state").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bank\.safetensors\.state is not a training state"):
        run(out)


def test_a_state_of_another_model(
    tmp_path: Path, spec: VitSpec, make_vit, image_folder: Callable[..., Path]
):
    folder = image_folder(tmp_path / "images", each=8)
    data = TrainData(open_images(folder), spec, Preprocess(), 4)

    def run(seed: int, method: str = "tome", report: Any = None) -> None:
        model = CompressedVit(make_vit(spec, seed), Method(method))
        bank = TrainableBank(spec, Method(method))
        distill(
            model,
            bank,
            data,
            Hyperparameters(2, 4, 1e-3),
            tmp_path / "b.safetensors",
            report=report,
        )

    with pytest.raises(KeyboardInterrupt):
        run(0, report=interrupt_at(5))  # the first epoch is saved
    with pytest.raises(CheckpointError, match=r"another recipe \(weights\)\."):
        run(1)
    with pytest.raises(CheckpointError, match=r'\(method "tome" there, "evit" here\)'):
        run(0, "evit")


@pytest.mark.parametrize("loss", ["kl", "classes"])
def test_a_model_without_a_head_has_features_alone(
    make_spec: Callable[..., VitSpec], make_vit: Callable, folder: Path, loss: Any
):
    spec = make_spec(image_size=(32, 32), depth=2, classes=0)
    model = CompressedVit(make_vit(spec), name="headless")
    data = TrainData(open_images(folder), spec, Preprocess(), 4)
    with pytest.raises(InputError, match=f"headless has no head, which `loss` {loss} .*features"):
        check_loss(loss, model, data)
    check_loss("features", model, data)


def test_labels_of_other_classes_than_the_models(
    model: CompressedVit, spec: VitSpec, folder: Path, tmp_path: Path
):
    data = TrainData(open_images(folder), spec, Preprocess(), 4)
    bank = TrainableBank(spec, Method("tome"))
    out = tmp_path / "bank.safetensors"
    with pytest.raises(InputError, match="`loss` classes: the data has 2 classes, the model 10"):
        distill(model, bank, data, HYPERPARAMETERS, out, loss="classes")
    assert not list(tmp_path.iterdir())
    check_loss("kl", model, data)


@pytest.mark.parametrize("arithmetic", ["shared", "no-inversion"])
def test_the_ablations_banks_are_distilled(
    run: Callable[..., ToComBank], tmp_path: Path, arithmetic: Any
):
    trained = run(tmp_path / "bank.safetensors", arithmetic=arithmetic)
    loaded = ToComBank.load(tmp_path / "bank.safetensors")
    assert (loaded.arithmetic, loaded.groups) == (arithmetic, {"shared": 1}.get(arithmetic, 32))
    np.testing.assert_array_equal(loaded.q_up, trained.q_up)
    assert trained.q_up.any()


def test_a_bank_is_distilled_in_bf16(run: Callable[..., ToComBank], tmp_path: Path):
    exact = run(tmp_path / "exact.safetensors")
    rough = run(tmp_path / "rough.safetensors", process=Process(amp=torch.bfloat16))
    assert rough.q_up.dtype == np.float32
    assert not np.array_equal(rough.q_up, exact.q_up)
    assert rough.q_up.any()

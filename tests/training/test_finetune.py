from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tocom_export.checkpoint import Checkpoint
from tocom_export.errors import CheckpointError
from tocom_export.images import Preprocess
from tocom_export.method import Method
from tocom_export.training.data import TrainData
from tocom_export.training.evaldata import EvalData
from tocom_export.training.evaluate import accuracy
from tocom_export.training.finetune import finetune
from tocom_export.training.loop import Recipe
from tocom_export.training.model import CompressedVit
from tocom_export.training.zoo import vit_from_spec

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

TOME = Method("tome")
RECIPE = Recipe(epochs=2, batch=4, lr=1e-2)
PREPROCESS = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)


class Stop(Exception):
    """Stands in for a killed process."""


class Run:
    """Fine-tuning of a tiny model on two colours."""

    def __init__(self, images: Path, spec: Any, method: Method) -> None:
        self.images = images
        torch.manual_seed(3)
        self.model = CompressedVit(vit_from_spec(spec), method, "tiny")
        self.data = TrainData(images, self.model.spec, PREPROCESS, 4)

    def __call__(self, out: Path, source: int = 4, recipe: Recipe = RECIPE, stop: int = 0) -> None:
        def report(step: int, total: int, loss: float, lr: float) -> None:
            if step == stop:
                raise Stop

        finetune(
            self.model, self.data, recipe, out, source=source, preprocess=PREPROCESS, report=report
        )


@pytest.fixture
def make_run(tmp_path: Path, image_folder: Callable[..., Path], make_spec) -> Callable[..., Run]:
    spec = make_spec(image_size=[24, 24], width=16, heads=2, depth=2, mlp_width=32, classes=2)
    images = image_folder(tmp_path / "images", ("cat", "dog"))
    return lambda method=TOME: Run(images, spec, method)


@pytest.mark.parametrize("method", [Method("tome"), Method("tome", False), Method("evit")])
def test_the_checkpoint_says_what_it_is(make_run, tmp_path: Path, method: Method):
    run = make_run(method)
    run(tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    assert checkpoint.fit(run.model.spec) == run.model.spec
    info = checkpoint.info
    assert info.spec == run.model.spec
    assert (info.source, info.method, info.preprocess) == (4, method, PREPROCESS)
    assert info.classes == ("cat", "dog")


def test_the_checkpoint_holds_the_trained_weights(make_run, tmp_path: Path):
    run = make_run()
    before = run.model.vit.head.weight.clone()
    run(tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    for name, tensor in run.model.vit.state_dict().items():
        assert torch.equal(tensor, written[name]), name
    assert not torch.equal(written["head.weight"], before)
    vit_from_spec(run.model.spec).load_state_dict(written)


def test_the_state_is_gone_when_the_checkpoint_is_there(make_run, tmp_path: Path):
    run = make_run()
    (tmp_path / "out").mkdir()
    with pytest.raises(Stop):
        run(tmp_path / "out" / "model.safetensors", stop=5)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".state", ".csv"}
    make_run()(tmp_path / "out" / "model.safetensors")
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".safetensors", ".csv"}


def test_a_broken_run_is_continued(make_run, tmp_path: Path):
    make_run()(tmp_path / "whole.safetensors")
    with pytest.raises(Stop):
        make_run()(tmp_path / "broken.safetensors", stop=4)
    make_run()(tmp_path / "broken.safetensors")
    whole, broken = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("whole", "broken"))
    assert whole == broken


def test_a_run_at_another_source_is_not_continued(make_run, tmp_path: Path):
    with pytest.raises(Stop):
        make_run()(tmp_path / "model.safetensors", source=0, stop=4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.state"):
        make_run()(tmp_path / "model.safetensors", source=4)


def test_a_folder_that_is_not_there_yet(make_run, tmp_path: Path):
    make_run()(tmp_path / "new" / "model.safetensors")
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_training_runs_at_the_source_degree(make_run, tmp_path: Path, monkeypatch):
    run = make_run()
    degrees: list[Any] = []
    forward = run.model.forward

    def spy(images: Tensor, degree: Any = 0, side: Any = None) -> Tensor:
        degrees.append(degree)
        return forward(images, degree, side)

    monkeypatch.setattr(run.model, "forward", spy)
    run(tmp_path / "model.safetensors", source=3)
    assert set(degrees) == {3}


def test_two_colours_are_learnt(make_run, tmp_path: Path):
    run = make_run()
    run(tmp_path / "model.safetensors", recipe=Recipe(epochs=8, batch=4, lr=5e-3))
    batches = EvalData(run.images, run.model.spec, PREPROCESS, batch=5)
    assert accuracy(run.model, batches, 4) == 100.0
    assert not run.model.training


def test_accuracy_counts_every_image(make_run):
    model = make_run().model.eval()
    images = torch.randn(7, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(images, 4).argmax(dim=1)
    labels[0] = 1 - labels[0]
    assert accuracy(model, [(images[:5], labels[:5]), (images[5:], labels[5:])], 4) == (
        pytest.approx(100 * 6 / 7)
    )

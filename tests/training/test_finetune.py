from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.errors import CheckpointError
from tocom_export.model.preprocess import Preprocess
from tocom_export.training.adaptformer import add_adapters, freeze_all_but_adapters
from tocom_export.training.building import vit_from_spec
from tocom_export.training.data.evaluation import EvalData
from tocom_export.training.data.opening import open_images
from tocom_export.training.data.train import TrainData
from tocom_export.training.finetune import finetune
from tocom_export.training.loop.distributed import Process
from tocom_export.training.loop.optimizer import Hyperparameters
from tocom_export.training.model import CompressedVit
from tocom_export.training.torch_engine import evaluate_model

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

TOME = Method("tome")
HYPERPARAMETERS = Hyperparameters(epochs=2, batch=4, lr=1e-2)
PREPROCESS = Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
EVENTS = {".tensorboard"}  # where it is installed


class Stop(Exception):
    """Stands in for a killed process."""


class Run:
    """Fine-tuning of a tiny model on two colours."""

    def __init__(self, images: Path, spec: Any, method: Method, adapter: float = 0.0) -> None:
        self.images = open_images(images)
        torch.manual_seed(3)
        vit = vit_from_spec(spec)
        if adapter:
            add_adapters(vit, 8, adapter)
            freeze_all_but_adapters(vit)
        self.model = CompressedVit(vit, method, "tiny")
        self.data = TrainData(self.images, self.model.spec, PREPROCESS, 4)

    def __call__(
        self,
        out: Path,
        source: int = 4,
        hyperparameters: Hyperparameters = HYPERPARAMETERS,
        stop: int = 0,
        **options: Any,
    ) -> None:
        def report(step: int, total: int, loss: float, lr: float) -> None:
            if step == stop:
                raise Stop

        finetune(
            self.model, self.data, hyperparameters, out, source=source, preprocess=PREPROCESS,
            report=report, **options,
        )  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path, image_folder: Callable[..., Path], make_spec) -> Callable[..., Run]:
    spec = make_spec(image_size=[24, 24], width=16, heads=2, depth=2, mlp_width=32, classes=2)
    images = image_folder(tmp_path / "images", ("cat", "dog"))
    return lambda method=TOME, adapter=0.0: Run(images, spec, method, adapter)


@pytest.mark.parametrize("method", [Method("tome"), Method("tome", False), Method("evit")])
def test_the_checkpoint_says_what_it_is(make_run, tmp_path: Path, method: Method):
    run = make_run(method)
    run(tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    assert checkpoint.check(run.model.spec) == run.model.spec
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
    assert {p.suffix for p in (tmp_path / "out").iterdir()} - EVENTS == {".state", ".csv"}
    make_run()(tmp_path / "out" / "model.safetensors")
    assert {p.suffix for p in (tmp_path / "out").iterdir()} - EVENTS == {".safetensors", ".csv"}


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
    with pytest.raises(CheckpointError, match=r"s\.state is .*\(source 0 there, 4 here\)"):
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
    run(tmp_path / "model.safetensors", hyperparameters=Hyperparameters(epochs=8, batch=4, lr=5e-3))
    batches = EvalData(run.images, run.model.spec, PREPROCESS, batch=5)
    assert evaluate_model(run.model, batches, 4) == 100.0
    assert not run.model.training


def test_accuracy_counts_every_image(make_run):
    model = make_run().model.eval()
    images = torch.randn(7, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(images, 4).argmax(dim=1)
    labels[0] = 1 - labels[0]
    assert evaluate_model(model, [(images[:5], labels[:5]), (images[5:], labels[5:])], 4) == (
        pytest.approx(100 * 6 / 7)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing": 0.0}, "label-smoothing 0.1 there, 0.0 here"),
        (
            {"hyperparameters": Hyperparameters(epochs=2, batch=4, lr=1e-3)},
            "lr 0.01 there, 0.001 here",
        ),
    ],
)
def test_a_run_of_another_recipe_is_not_continued(
    make_run, tmp_path: Path, options: dict, words: str
):
    with pytest.raises(Stop):
        make_run()(tmp_path / "model.safetensors", stop=4)
    with pytest.raises(CheckpointError, match=rf"\({words}\)"):
        make_run()(tmp_path / "model.safetensors", **options)


def test_only_adapters_and_head_are_trained(make_run, tmp_path: Path):
    run = make_run(adapter=0.5)
    before = {name: tensor.clone() for name, tensor in run.model.vit.state_dict().items()}
    run(tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == before.keys()
    for name, tensor in before.items():
        changes = name.startswith("head.") or ".adapter_" in name
        assert torch.equal(written[name], tensor) != changes, name


def test_the_checkpoint_of_an_adapted_model_has_its_scale_merged(make_run, tmp_path: Path):
    run = make_run(adapter=0.5)
    run(tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    spec = checkpoint.info.spec
    assert spec == run.model.spec
    assert spec.adapter_width == 8
    assert checkpoint.check(spec) == spec
    again = vit_from_spec(spec)  # scale 1
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(CompressedVit(again).eval()(images, 4),
                                   run.model.eval()(images, 4))  # fmt: skip


def test_a_run_with_another_adapter_scale_is_not_continued(make_run, tmp_path: Path):
    with pytest.raises(Stop):
        make_run(adapter=0.5)(tmp_path / "model.safetensors", stop=4)
    with pytest.raises(CheckpointError, match=r"\(adapter-scale 0.5 there, 0.1 here\)"):
        make_run(adapter=0.1)(tmp_path / "model.safetensors")


def test_a_run_that_trains_other_weights_is_not_continued(make_run, tmp_path: Path):
    with pytest.raises(Stop):
        make_run()(tmp_path / "model.safetensors", stop=4)
    run = make_run()
    run.model.vit.blocks[0].requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"\(trained\)"):
        run(tmp_path / "model.safetensors")


def test_bf16_leaves_float32_weights(make_run, tmp_path: Path):
    make_run()(tmp_path / "exact.safetensors")
    make_run()(tmp_path / "rough.safetensors", process=Process(amp=torch.bfloat16))
    exact, rough = (load_file(tmp_path / f"{n}.safetensors") for n in ("exact", "rough"))
    assert {t.dtype for t in rough.values()} == {torch.float32}
    assert all(t.isfinite().all() for t in rough.values())
    assert not torch.equal(exact["head.weight"], rough["head.weight"])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
# torch looks at .grad while it compiles, and hides this warning in a way that pytest overrides.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_says_the_same(make_spec, make_vit, make_images):
    spec = make_spec(image_size=[16, 16], width=16, heads=2, depth=1, mlp_width=32)
    plain, compiled = CompressedVit(make_vit(spec)), CompressedVit(make_vit(spec))
    compiled.compile()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    images = torch.from_numpy(make_images(spec))
    for degree in (0, 1):
        torch.testing.assert_close(compiled(images, degree), plain(images, degree))

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.compression.method import Method
from tocom_export.loading import Model
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.training.bank_report import (
    PAIRS,
    BankReport,
    PairReport,
    explain_labels,
    report_bank,
)
from tocom_export.training.building import vit_from_spec
from tocom_export.training.distill import distill_loss
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit
from tocom_export.training.torch_engine import BankOracle
from tocom_export.variant import Variant


class Images:
    """Ten images in batches of 4, 4 and 2."""

    name = "images"

    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(4), self.labels.split(4), strict=True)


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(image_size=(32, 32), depth=2)


@pytest.fixture(scope="module")
def images(make_images: Callable[..., Any], spec: VitSpec) -> Images:
    labels = torch.arange(10) % 3
    return Images(torch.from_numpy(make_images(spec, 10)), labels, tuple("abcdefghij"))


@pytest.fixture
def model(spec: VitSpec, make_weights: Callable[..., Any]) -> CompressedVit:
    """In training mode, with drop path, as distillation leaves it."""
    vit = vit_from_spec(spec, drop_path=0.5)
    vit.load_state_dict({n: torch.from_numpy(w) for n, w in make_weights(spec).items()})
    return CompressedVit(vit).train()


@pytest.fixture
def bank(spec: VitSpec, make_bank: Callable[..., Any]) -> TrainableBank:
    """Of random factors, in training mode."""
    return TrainableBank.from_bank(make_bank(spec), spec).train()


def test_distances_are_those_of_distillation(
    model: CompressedVit, bank: TrainableBank, spec: VitSpec, images: Images
):
    report = report_bank(model, bank, images)
    assert (report.measure, report.images, report.untrained) == ("kl", 10, False)
    assert [(pair.source, pair.target) for pair in report.pairs] == [*PAIRS]
    assert not (model.training or bank.training)
    untrained = TrainableBank(spec, Method("tome")).eval()
    for pair in report.pairs:
        for distance, steps in ((pair.without, untrained), (pair.compensated, bank)):
            with torch.no_grad():
                wanted = distill_loss(model, steps, images.images, pair.source, pair.target).item()
            assert distance == pytest.approx(wanted, rel=1e-4)
        assert pair.without != pytest.approx(pair.compensated, rel=1e-2)


def test_accuracies_are_those_of_the_variants(
    model: CompressedVit, bank: TrainableBank, spec: VitSpec, images: Images
):
    oracle, told = BankOracle(model, bank.to_bank()), set()
    for pair in report_bank(model, bank, images).pairs:
        assert pair.scores is not None
        runs = ((pair.source, False), (pair.target, False), (pair.target, True))
        for score, (degree, compensated) in zip(pair.scores, runs, strict=True):
            given = {"source": pair.source, "compensated": compensated}
            logits = oracle(Variant.of(spec, degree, **given), images.images.numpy())
            right = (logits.argmax(axis=1) == images.labels.numpy()).sum()
            assert (score.accuracy, score.total) == (pytest.approx(10 * right), 10)
            told.add(score.accuracy)
    assert len(told) > 1


def test_the_scale_is_that_of_training(
    model: CompressedVit, spec: VitSpec, images: Images, make_bank: Callable[..., Any]
):
    found = set()
    for scale in (0.1, 0.3):
        bank = TrainableBank.from_bank(make_bank(spec), spec)
        bank.scale = scale
        found.add(report_bank(model, bank, images).pairs[0].compensated)
    assert len(found) == 2


def test_a_model_without_a_head_is_measured_by_its_features(
    make_spec: Callable[..., VitSpec], make_vit: Callable[..., Any],
    make_bank: Callable[..., Any], images: Images,
):  # fmt: skip
    spec = make_spec(image_size=(32, 32), depth=2, classes=0)
    model, bank = CompressedVit(make_vit(spec)), TrainableBank.from_bank(make_bank(spec), spec)
    report = report_bank(model, bank, images)
    assert report.measure == "features"
    for pair in report.pairs:
        degrees = (pair.source, pair.target)
        with torch.no_grad():
            wanted = distill_loss(model, bank, images.images, *degrees, loss="features").item()
        assert pair.compensated == pytest.approx(wanted, rel=1e-4)
        assert pair.scores is None


def test_labels_that_say_nothing(model: CompressedVit, bank: TrainableBank, images: Images):
    report = report_bank(model, bank, images, labelled=False)
    assert [pair.scores for pair in report.pairs] == [None] * 3
    assert report.to_json()["pairs"][0] == {
        "source": 0,
        "target": 8,
        "distance": {"without": report.pairs[0].without, "with": report.pairs[0].compensated},
        "accuracy": None,
    }


def test_a_trained_bank_is_no_cause_for_doubt(model: CompressedVit, spec: VitSpec, images: Images):
    torch.manual_seed(0)
    model.eval().requires_grad_(False)
    bank = TrainableBank(spec, Method("tome"), dropout=0.0)
    report = report_bank(model, bank, images)
    assert report.untrained
    assert "its up factors (B) are all still zero. Train it for more `epochs`" in report.doubt
    assert [pair.without for pair in report.pairs] == [pair.compensated for pair in report.pairs]

    optimizer = torch.optim.AdamW(bank.parameters(), lr=1e-2)
    for step in range(45):
        optimizer.zero_grad()
        distill_loss(model, bank, images.images, *PAIRS[step % 3]).backward()
        optimizer.step()
    report = report_bank(model, bank, images)
    assert [pair.helped for pair in report.pairs] == [True] * 3
    assert report.doubt == ""


@pytest.mark.parametrize(
    ("compensated", "where"),
    [
        ((0.5, 0.5, 0.5), ""),
        ((0.991, 0.5, 0.989), " at 0 → 8. "),
        ((0.5, 0.5, 1.2), " at 16 → 0. "),
        ((1.0, 1.0, float("nan")), " at 0 → 8, 0 → 16, 16 → 0. "),
    ],
)
def test_a_bank_that_changes_nothing(compensated: tuple[float, ...], where: str):
    pairs = tuple(
        PairReport(*pair, 1.0, value, None) for pair, value in zip(PAIRS, compensated, strict=True)
    )
    report = BankReport("features", 10, pairs, untrained=False)
    assert where in report.doubt
    assert bool(report.doubt) == bool(where)
    assert "lowers the distance" in report.doubt or not where


@pytest.mark.parametrize(
    ("classes", "known", "says"),
    [
        (10, None, ""),
        (10, tuple("abcdefghij"), ""),
        (10, tuple("abcdefghjk"), "`val` x has a class 'i' where model has 'j'"),
        (3, None, "`val` x has 10 classes, but model has a head of 3"),
        (0, None, ""),
    ],
)
def test_whose_the_labels_are(
    make_spec: Callable[..., VitSpec], images: Images, classes: int,
    known: tuple[str, ...] | None, says: str,
):  # fmt: skip
    info = ModelInfo(classes=known)
    spec = make_spec(classes=classes)
    model = Model(spec, Checkpoint(Path("model"), {}, info), Preprocess())
    told = explain_labels(model, images, "`val` x")
    assert told.startswith(says)
    assert bool(told) == bool(says)


def test_a_step_of_the_bar_for_each_batch(
    model: CompressedVit, bank: TrainableBank, images: Images
):
    steps: list[Any] = []

    class Bar:
        def __init__(self, *opened: object) -> None:
            steps.append(opened)

        def __enter__(self) -> Callable[[str], None]:
            return steps.append

        def __exit__(self, *_: object) -> None:
            steps.append(None)

    report_bank(model, bank, images, progress=Bar)
    assert steps == [("measuring", 3), "", "", "", None]

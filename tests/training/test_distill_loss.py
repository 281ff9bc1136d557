from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tocom_export.compression.method import Method
from tocom_export.model.spec import VitSpec
from tocom_export.training.building import vit_from_spec
from tocom_export.training.distill import distill_loss
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(image_size=(32, 32), depth=2)


@pytest.fixture
def model(spec: VitSpec, make_vit: Callable) -> CompressedVit:
    return CompressedVit(make_vit(spec)).eval()


@pytest.fixture
def images(spec: VitSpec, make_images: Callable) -> torch.Tensor:
    return torch.from_numpy(make_images(spec, 4))


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


def test_features_are_compared_by_their_mean_distance(
    make_spec: Callable[..., VitSpec], make_vit: Callable, make_bank: Callable,
    make_images: Callable,
):  # fmt: skip
    spec = make_spec(image_size=(32, 32), depth=2, classes=0, pool="avg", final_norm="fc_norm")
    model = CompressedVit(make_vit(spec)).eval()
    bank = TrainableBank.from_bank(make_bank(spec), spec)
    images = torch.from_numpy(make_images(spec, 4))
    loss = distill_loss(model, bank, images, 2, 8, "features")
    with torch.no_grad():
        tokens = [model.features(images, degree)[0].shape[1] for degree in (2, 8)]
        teacher, student = model(images, 2), model(images, 8, bank.side(2, 8))  # no head: pooled
    assert tokens[0] > tokens[1]
    assert teacher.shape == (4, spec.width)
    assert loss.item() == pytest.approx((teacher - student).abs().mean().item(), rel=1e-5)
    loss.backward()
    assert bank.up.grad[:, :, 2:8].any()


def test_features_of_a_model_with_a_head_are_what_the_head_reads(
    model: CompressedVit, spec: VitSpec, images: torch.Tensor, make_bank: Callable
):
    bank = TrainableBank.from_bank(make_bank(spec), spec)
    with torch.no_grad():
        loss = distill_loss(model, bank, images, 0, 8, "features")
        sides = ((0, None), (8, bank.side(0, 8)))
        read = [model.vit.norm(model.features(images, *s)[0])[:, 0] for s in sides]
        pooled = [model.embedding(images, *s) for s in sides]
        for features, side in zip(pooled, sides, strict=True):
            torch.testing.assert_close(model.vit.head(features), model(images, *side))
    assert read[0].shape == pooled[0].shape
    assert loss.item() == pytest.approx((pooled[0] - pooled[1]).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_classes_are_compared_with_the_labels(
    model: CompressedVit, spec: VitSpec, images: torch.Tensor, make_bank: Callable, soft: bool
):
    bank = TrainableBank.from_bank(make_bank(spec), spec)
    labels = torch.tensor([1, 9, 0, 4])
    targets = F.one_hot(labels, spec.classes).float()
    if soft:
        labels = targets = 0.7 * targets + 0.3 * targets.roll(1, dims=0)
    with torch.no_grad():
        loss = distill_loss(model, bank, images, 3, 8, "classes", labels)
        says = model(images, 8, bank.side(3, 8)).double().log_softmax(dim=-1)
    assert loss.item() == pytest.approx(-(targets * says).sum(dim=-1).mean().item(), rel=1e-5)


def test_drop_path_is_the_students_alone(spec: VitSpec, make_images: Callable, make_weights):
    vit = vit_from_spec(spec, drop_path=0.9999)
    vit.load_state_dict({n: torch.from_numpy(w) for n, w in make_weights(spec).items()})
    model = CompressedVit(vit).train()
    images = torch.from_numpy(make_images(spec, 4))
    said: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    forward = model.forward

    def spy(*inputs: Any) -> torch.Tensor:
        out = forward(*inputs)
        said["student" if torch.is_grad_enabled() else "teacher"].append(out.detach())
        return out

    model.forward = spy
    bank = TrainableBank(spec, Method("tome"))
    for seed in range(3):
        torch.manual_seed(seed)
        distill_loss(model, bank, images, 0, 8)
        assert model.training
        assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        kept = forward(images)
        for block in model.vit.blocks[1:]:  # the first layer's drop path is 0
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
        dropped = forward(images, 8)
    for teacher, student in zip(said["teacher"], said["student"], strict=True):
        torch.testing.assert_close(teacher, kept)
        torch.testing.assert_close(student, dropped)  # but once in 400
    assert (kept - dropped).abs().max() > 0.1

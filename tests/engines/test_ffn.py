"""Merging for the MLP alone: engines, PyTorch and a loop over tokens say the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tocom_export.bundle.manifest import Manifest
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compensation import choose_method
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.metadata import ModelInfo
from tocom_export.compression.method import Method
from tocom_export.compression.rules import list_degrees
from tocom_export.compression.schedule import Schedule
from tocom_export.engines.onnx.calibration import measure_input_scales
from tocom_export.engines.verify import sample_images, verify
from tocom_export.errors import BankError, DegreeError, InputError
from tocom_export.io.json_codec import decode, encode
from tocom_export.training.distill import distill_loss
from tocom_export.training.lora import TrainableBank
from tocom_export.training.model import CompressedVit
from tocom_export.training.torch_engine import make_oracle
from tocom_export.variant import Variant

FFN = Method("tome", merge="ffn")
MIXED = (9, 0, 24, 3)
KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "average, fc_norm": {"pool": "avg", "final_norm": "fc_norm"},
    "no class token": {"class_token": False, "pool": "avg"},
    "map": {"class_token": False, "pool": "map", "pool_heads": 4, "pool_mlp_width": 128},
    "distilled": {"distilled": True},
    "registers, scaled": {"registers": 4, "layer_scale": True},
    "normed behind": {"family": "eva", "post_norm": True},
}
RUNTIMES: dict[str, dict[str, Any]] = {
    "onnx": {"threads": 1},
    "openvino": {"backend": "openvino", "inference_precision": "f32", "threads": 1},
}
Make = Callable[..., Bundle]
Array = np.ndarray[Any, Any]


@pytest.fixture
def make(make_blueprint: Callable[..., Blueprint], make_spec: Any, tmp_path: Path) -> Make:
    """A bundle of a small model that merges for the MLP alone, with tokens beside its logits."""

    def call(changes: dict[str, Any] | None = None, name: str = "b", **more: Any) -> Bundle:
        spec = make_spec(**(changes or {}))
        given = {"bank": None, "targets": (), "schedules": {}, "precision": "fp32", **more}
        made = make_blueprint(
            tmp_path, spec, bank=given["bank"], method=FFN, targets=(), precision=given["precision"]
        )
        named = [*((None, d) for d in given["targets"]), *given["schedules"].items()]
        compensated = given["bank"] is not None
        variants = [
            Variant.of(spec, d, name, compensated=compensated, merge="ffn") for name, d in named
        ]
        return write_bundle(
            dataclasses.replace(
                made, variants={v.name: v for v in variants}, outputs=("tokens", "logits")
            ),
            tmp_path / name,
        )

    return call


def differ(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@torch.inference_mode()
def run_slowly(model: CompressedVit, images: Array, degrees: Any) -> Array:
    """The last layer's tokens of one image at a time, groups of tokens averaged one by one."""
    spec, found = model.spec, []
    for image in torch.from_numpy(images):
        x = model._embed(image[None])[0]  # (N, C)
        for block, degree in zip(model.vit.blocks, degrees, strict=True):
            normed = block.norm1(x)
            x = x + scale(block, 1, block.attn(normed[None])[0])
            _, keys, _ = block.attn.qkv(normed).chunk(3, dim=-1)
            keys = keys.reshape(len(x), spec.heads, -1).mean(dim=1).numpy().astype(np.float64)
            keys /= np.linalg.norm(keys, axis=1, keepdims=True)
            patches = range(spec.prefix, len(x))
            a, b = ([i for i in patches if i % 2 == odd] for odd in (0, 1))
            likeness = keys[a] @ keys[b].T
            goes = np.argsort(-likeness.max(axis=1))[: min(degree, len(patches) // 2)]
            group = list(range(len(x)))
            for index in goes:
                group[a[index]] = b[likeness[index].argmax()]
            gained = torch.empty_like(x)
            for of in set(group):
                members = [i for i, which in enumerate(group) if which == of]
                mean = x[members].mean(dim=0, keepdim=True)
                gained[members] = scale(block, 2, block.mlp(block.norm2(mean)))
            x = x + gained
        found.append(model.vit.norm(x)[spec.prefix :].numpy())
    return np.stack(found)


def scale(block: Any, which: int, branch: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = getattr(block, f"ls{which}")(branch)
    return scaled


@pytest.mark.parametrize("kind", ["token", "no class token", "distilled", "registers, scaled"])
def test_the_model_does_what_a_loop_over_tokens_does(make_vit: Any, make_spec: Any, kind: str):
    spec = make_spec(**KINDS[kind])
    model, images = CompressedVit(make_vit(spec), FFN).eval(), sample_images(spec, 2)
    for degrees in ((8,) * 4, MIXED):
        with torch.inference_mode():
            found = model.give(torch.from_numpy(images), ("tokens",), degrees)["tokens"]
        assert differ(found, run_slowly(model, images, degrees)) < 1e-5


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_engines_do_what_the_model_does(make: Make, make_vit: Any, kind: str, runtime: str):
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    bundle = make(KINDS[kind], targets=(0, 8, 16), schedules={"mixed": MIXED})
    images, oracle = sample_images(bundle.spec, 3), make_oracle(bundle)
    assert Bundle.open(bundle.path, hashes=True).method == FFN
    found = {name: bundle.engine(name, **RUNTIMES[runtime]).run_all(images)
             for name in bundle.variants}  # fmt: skip
    for name, variant in bundle.variants.items():
        for output, wanted in oracle.run_all(variant, images).items():
            assert found[name][output].shape == wanted.shape
            assert differ(found[name][output], wanted) < 1e-4, (name, output)
    vit = make_vit(bundle.spec)
    with torch.inference_mode():  # where nothing goes, it is the plain model
        plain = vit.eval()(torch.from_numpy(images)).numpy()
    assert differ(found["r00"]["logits"], plain) < 1e-5
    assert differ(found["r16"]["logits"], plain) > 1e-4
    assert len({of["tokens"].shape for of in found.values()}) == 1


def test_a_schedule_begins_anew_in_each_layer(make_spec: Any):
    spec = make_spec()
    found, block = Schedule.of(spec, MIXED, "ffn"), Schedule.of(spec, MIXED)
    assert (found.tokens_in, found.left) == ((50,) * 4, 50)
    assert found.tokens_out == (41, 50, 26, 47)
    assert found.removed == (9, 0, 24, 3)
    assert block.left == block.tokens_out[-1]
    assert Schedule.of(spec, 99, "ffn").removed == (24,) * 4
    dense, c = Schedule.of(spec, 0).macs(spec), spec.width
    assert Schedule.of(spec, 0, "ffn").macs(spec) == dense
    assert dense - found.macs(spec) == 36 * 2 * c * spec.mlp_width
    pooled = make_spec(**KINDS["map"])
    spared = Schedule.of(pooled, 0).macs(pooled) - Schedule.of(pooled, 8, "ffn").macs(pooled)
    assert spared == 4 * 8 * 2 * c * spec.mlp_width


def test_layers_are_compensated_for_what_was_merged_before_them(make_spec: Any):
    spec = make_spec()
    for degree in (0, 8, 16):
        assert Schedule.of(spec, degree, "ffn").targets == (degree,) * 4
    assert Schedule.of(spec, MIXED, "ffn").targets == (9, 9, 4.5, 11)
    assert Schedule.of(spec, (24, 24, 24, 0), "ffn").targets == (16,) * 4
    few = Schedule.of(spec, (4, 2, 3, 5))
    assert Schedule.of(spec, (4, 2, 3, 5), "ffn").targets == few.targets  # nothing is bounded


def test_a_bank_is_of_one_form(make: Make, make_bank: Any, make_spec: Any, tmp_path: Path):
    spec = make_spec()
    within = dataclasses.replace(make_bank(spec), method=FFN)
    with pytest.raises(
        BankError, match="has method tome, but small is to have tome within the FFN"
    ):
        make_bank(spec).check(spec, FFN)
    with pytest.raises(
        BankError, match="has method tome within the FFN, but small is to have tome;"
    ):
        within.check(spec, Method("tome"))
    within.save(tmp_path / "bank.safetensors")
    assert ToComBank.load(tmp_path / "bank.safetensors").method == FFN
    bundle = make({}, bank=within, targets=(0, 8), schedules={"mixed": MIXED})
    oracle = make_oracle(bundle, within)
    for found in verify(bundle, sample_images(spec), oracle.run_all, threads=1):
        assert found.passed and found.max_difference, found


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_other_precisions(make: Make, precision: Any):
    bundle = make({}, targets=(8,), precision=precision)
    for found in verify(bundle, sample_images(bundle.spec), make_oracle(bundle).run_all):
        assert found.passed, found
    if precision == "int8":
        wide = make({}, "wide", targets=(8,))
        scales = measure_input_scales(wide, "r08", sample_images(wide.spec))
        assert {f"blocks.{i}.mlp.fc{j}" for i in range(4) for j in (1, 2)} <= scales.keys()


def test_a_bank_is_distilled_for_it(make_vit: Any, make_spec: Any):
    """The student's loss falls, and the bank that comes of it says what it is for."""
    spec = make_spec()
    model = CompressedVit(make_vit(spec), FFN).eval()
    for weight in model.parameters():
        weight.requires_grad_(False)
    torch.manual_seed(0)
    bank, images = TrainableBank(spec, FFN, dropout=0.0), torch.from_numpy(sample_images(spec, 8))
    optimizer = torch.optim.AdamW(bank.parameters(), 1e-2, weight_decay=0.0)
    losses = []
    for _ in range(12):
        loss = distill_loss(model, bank, images, 0, 16, "kl")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert bank.to_bank().method == FFN


def test_what_is_written_of_it(make: Make):
    """Nothing where it is what it was before there was another form."""
    assert encode(Method("tome")) == {"name": "tome", "proportional": True}
    assert encode(FFN) == {"name": "tome", "proportional": False, "merge": "ffn"}
    assert decode(Method, encode(FFN)) == FFN == Method("tome", True, "ffn")
    assert (str(FFN), FFN.label, Method("evit").label) == (*["tome within the FFN"] * 2, "evit")
    bundle = make({}, targets=(8,))
    assert bundle.to_json()["variants"]["r08"]["merge"] == "ffn"
    fields = {f.name for f in dataclasses.fields(Manifest)}
    data = {k: v for k, v in vars(bundle).items() if k in fields}
    with pytest.raises(InputError, match="r08 merges otherwise than the method"):
        Manifest(**{**data, "method": Method("tome")})


def test_what_is_asked_for(make_bank: Any, make_spec: Any, make_vit: Any):
    within = dataclasses.replace(make_bank(make_spec()), method=FFN)
    masked = ModelInfo(method=Method("tome", proportional=False))
    assert choose_method(None, None, ModelInfo()) == Method("tome")
    assert choose_method(None, within, masked) == FFN
    assert choose_method(None, None, ModelInfo(method=FFN)) == FFN
    assert choose_method(None, None, masked, merge="ffn") == FFN
    assert choose_method("evit", within, ModelInfo()) == Method("evit")
    assert choose_method("tome", None, ModelInfo(method=FFN), merge="block") == Method("tome")
    assert choose_method(None, None, masked, merge="block").proportional is False
    with pytest.raises(InputError, match="`merge` ffn: evit drops tokens"):
        choose_method("evit", None, ModelInfo(), merge="ffn")
    with pytest.raises(DegreeError, match=r"keep:0\.5 is for merges that later layers begin with"):
        list_degrees(make_spec(), "keep:0.5", "ffn")
    with pytest.raises(InputError, match="`outputs` map: with `merge` ffn each patch keeps"):
        CompressedVit(make_vit(make_spec()), FFN).give(torch.zeros(1, 3, 56, 56), ("tokens", "map"))

"""timm's relatives of the plain ViT: spec, PyTorch model and graph say the same of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tocom_export import export
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.method import Method
from tocom_export.errors import InputError
from tocom_export.io.tensors import read_header
from tocom_export.model.from_tensors import fit_spec
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.model.spec import VitSpec
from tocom_export.training.adaptformer import add_adapters
from tocom_export.training.building import vit_from_spec
from tocom_export.training.model import CompressedVit
from tocom_export.training.timm_models import spec_of_name
from tocom_export.training.torch_engine import BankOracle

NAMES = (
    "vit_base_patch16_siglip_224",  # attention pooling
    "vit_giant_patch14_dinov2",  # SwiGLU, packed
    "vit_small_patch16_dinov3",  # rotary positions alone, registers
    "vit_small_plus_patch16_dinov3",  # and SwiGLU, aligned
    "eva02_tiny_patch14_224",  # rotary and learned positions, packed SwiGLU
    "eva02_base_patch14_224",  # q, k, v by themselves, norms within attention and MLP
    "eva02_enormous_patch14_clip_224",  # norms behind the branches
    "vit_small_patch16_rope_mixed_224",  # frequencies that are weights
    "vit_pe_core_tiny_patch16_384",  # class token and attention pooling
    "beit3_base_patch16_224",  # sub-LayerNorms
    "aimv2_large_patch14_224",  # RMSNorm, a norm of the patches
    "beit_base_patch16_224",  # tables of relative positions
    "vit_relpos_base_patch16_cls_224",  # an MLP of relative positions, a class token
    "vit_srelpos_small_patch16_224",  # one for all layers
    "vit_relpos_small_patch16_rpn_224",
    "vit_base_patch16_sapiens2",  # layer scale of attention alone
    "test_vit3",  # attention pooling that reads the registers
)
DEGREES: dict[str, Any] = {"r00": 0, "r04": 4, "mixed": [5, 0, 3]}


def shrink(spec: VitSpec) -> VitSpec:
    """The same kind of model with three layers of two heads and 36 patches."""
    width = 2 * spec.head_width
    share = width / spec.width
    return replace(
        spec,
        depth=3,
        width=width,
        heads=2,
        classes=7,
        image_size=(6 * spec.patch_size[0], 6 * spec.patch_size[1]),
        mlp_width=int(spec.mlp_width * share),
        pool_heads=2 if spec.pool_heads else 0,
        pool_mlp_width=int(spec.pool_mlp_width * share),
    )


def perturb(vit: torch.nn.Module) -> None:
    """Weights that leave nothing at one or zero, where a mistake would hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in vit.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("freqs"):
                continue
            weight.add_(noise * (0.08 if weight.ndim > 1 else 0.1))
            if "gamma" in name:
                weight.copy_(1 + 0.2 * noise)


def draw(spec: VitSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Three structured images."""
    height, width = spec.image_size
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    images = [
        [np.sin(7 * x + i) + 0.6 * (y > 0.4 + 0.1 * i), np.cos(9 * y * x + i), (x - y) * np.cos(i)]
        for i in range(3)
    ]
    return np.array(images, np.float32)


def differ(found: Any, wanted: Any) -> float:
    """The largest difference as a share of the largest value."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> tuple[VitSpec, Any]:
    """A small model of each kind, perturbed."""
    spec = shrink(spec_of_name(request.param))
    torch.manual_seed(1)
    vit: Any = vit_from_spec(spec)
    perturb(vit)
    vit.pretrained_cfg = {"architecture": request.param}
    return spec, vit


def test_a_spec_says_what_timm_built(family: tuple[VitSpec, Any]) -> None:
    spec, vit = family
    assert spec_from_timm(vit) == spec
    assert {name: tuple(t.shape) for name, t in vit.state_dict().items()} == spec.weights()


def test_graphs_agree_with_pytorch_and_pytorch_with_timm(
    family: tuple[VitSpec, Any], tmp_path: Path
) -> None:
    spec, vit = family
    images = draw(spec)
    model = CompressedVit(vit).eval()
    with torch.inference_mode():
        assert differ(model(torch.from_numpy(images)), vit(torch.from_numpy(images))) < 1e-5
    bundle = export(
        vit, tmp_path / "b", bank="none", targets=(0, 4), schedules={"mixed": [5, 0, 3]},
        verify=False,
    )  # fmt: skip
    for name, degree in DEGREES.items():
        engine = bundle.engine(name)
        for count in (1, 3):
            batch = images[:count]
            with torch.inference_mode():
                wanted = model(torch.from_numpy(batch), degree)
            assert differ(engine.run(batch), wanted) < 1e-4, name


def test_patches_have_their_tokens(family: tuple[VitSpec, Any], tmp_path: Path) -> None:
    spec, vit = family
    images, model = draw(spec), CompressedVit(vit).eval()
    bundle = export(
        vit, tmp_path / "b", bank="none", targets=(0, 4), schedules={"mixed": [5, 0, 3]},
        outputs=("tokens", "map"), verify=False,
    )  # fmt: skip
    with torch.inference_mode():
        whole = vit.forward_features(torch.from_numpy(images))[:, spec.prefix :]
    assert differ(bundle.engine("r00").run(images), whole) < 1e-5
    for name, degree in DEGREES.items():
        with torch.inference_mode():
            wanted = model.give(torch.from_numpy(images), bundle.outputs, degree)
        found = bundle.engine(name).run_all(images)
        assert differ(found["tokens"], wanted["tokens"]) < 1e-4, name
        np.testing.assert_array_equal(found["map"], wanted["map"].numpy())


def test_merging_for_the_mlp_alone(family: tuple[VitSpec, Any], tmp_path: Path) -> None:
    spec, vit = family
    images, model = draw(spec), CompressedVit(vit, Method("tome", merge="ffn")).eval()
    bundle = export(
        vit, tmp_path / "b", bank="none", targets=(0, 4), schedules={"mixed": [5, 0, 3]},
        outputs=("logits", "tokens"), merge="ffn", verify=False,
    )  # fmt: skip
    with torch.inference_mode():
        whole = vit(torch.from_numpy(images))
    assert differ(bundle.engine("r00").run(images), whole) < 1e-5
    assert differ(bundle.engine("r04").run(images), whole) > 1e-5
    for name, degree in DEGREES.items():
        with torch.inference_mode():
            wanted = model.give(torch.from_numpy(images), bundle.outputs, degree)
        for output, found in bundle.engine(name).run_all(images).items():
            assert differ(found, wanted[output]) < 1e-4, (name, output)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_pruned_tokens_keep_their_positions(name: str, tmp_path: Path) -> None:
    spec = replace(shrink(spec_of_name(name)), pool="token", final_norm="norm")
    vit: Any = vit_from_spec(spec)
    perturb(vit)
    images, model = draw(spec), CompressedVit(vit, Method("evit")).eval()
    bundle = export(vit, tmp_path / "b", bank="none", targets=(5,), method="evit", verify=False)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(images), 5)
    assert differ(bundle.engine("r05").run(images), wanted) < 1e-4


def test_positions_matter(family: tuple[VitSpec, Any]) -> None:
    spec, vit = family
    if spec.rotary is None and spec.relative is None:
        pytest.skip("its positions are part of its tokens")
    images = torch.from_numpy(draw(spec))
    model = CompressedVit(vit).eval()
    with torch.inference_mode():
        before = model(images, 4)
        for tensor in (*vit.parameters(), *vit.buffers()):
            if tensor.is_floating_point() and tuple(tensor.shape[-1:]) == (2 * spec.head_width,):
                tensor.mul_(0.5)  # sines and cosines
        for label, weight in vit.named_parameters():
            if "rel_pos" in label or "relative" in label or "freqs" in label:
                weight.mul_(3)
        assert differ(model(images, 4), before) > 1e-4


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_run_and_stay_near(
    family: tuple[VitSpec, Any], precision: Any, tmp_path: Path
) -> None:
    spec, vit = family
    images = draw(spec)
    calibrate = "none" if precision == "int8" else None
    bundle = export(
        vit, tmp_path / "b", bank="none", targets=(0,), precision=precision, calibrate=calibrate,
        verify=False,
    )  # fmt: skip
    with torch.inference_mode():
        wanted = CompressedVit(vit).eval()(torch.from_numpy(images))
    assert differ(bundle.engine("r00").run(images), wanted) < (0.01 if precision == "fp16" else 0.3)


def test_openvino_agrees(family: tuple[VitSpec, Any], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    spec, vit = family
    images, model = draw(spec), CompressedVit(vit).eval()
    bundle = export(
        vit, tmp_path / "b", bank="none", targets=(0, 4), schedules={"mixed": [5, 0, 3]},
        verify=False,
    )  # fmt: skip
    how: dict[str, Any] = {"backend": "openvino", "inference_precision": "f32"}
    for name, degree in DEGREES.items():
        with torch.inference_mode():
            wanted = model(torch.from_numpy(images), degree)
        # A second start opens what the first one compiled and kept, which may be another thing.
        for start in ("compiled", "kept"):
            for fixed in ({}, {"batch": 3}):
                engine = bundle.engine(name, **how, **fixed)
                assert differ(engine.run(images), wanted) < 1e-4, (name, start, fixed)


def test_a_bank_changes_queries_and_values_that_lie_by_themselves(tmp_path: Path) -> None:
    spec = shrink(spec_of_name("eva02_base_patch14_224"))
    vit: Any = vit_from_spec(spec)
    perturb(vit)
    rng = np.random.default_rng(0)
    shapes = [(3, 16, 4, spec.width), (3, 16, spec.width, 4)] * 2
    q_down, q_up, v_down, v_up = (rng.normal(0, 0.1, s).astype(np.float32) for s in shapes)
    bank = ToComBank(q_down, q_up, v_down, v_up, Method("tome"))
    bundle = export(vit, tmp_path / "b", bank=bank, targets=(4,), scale=1.0, verify=False)
    own, _ = read_header(bundle.path / "r04.safetensors")
    assert sorted(name.split(".")[3] for name in own) == ["q_proj"] * 3 + ["v_proj"] * 3
    images, model = draw(spec), CompressedVit(vit).eval()
    wanted = BankOracle(model, bank)(bundle.variants["r04"], images)
    assert differ(bundle.engine("r04").run(images), wanted) < 1e-4
    with torch.inference_mode():
        assert differ(model(torch.from_numpy(images), 4), wanted) > 1e-3


def test_adapters_are_refused_beside_a_gated_mlp() -> None:
    vit = vit_from_spec(shrink(spec_of_name("vit_giant_patch14_dinov2")))
    with pytest.raises(InputError, match="gated MLPs"):
        add_adapters(vit, 8)


def test_attention_pooling_is_part_of_the_weights() -> None:
    spec = shrink(spec_of_name("vit_base_patch16_siglip_224"))
    with pytest.raises(InputError, match="pools by attention, for which its weights are made"):
        fit_spec(spec, spec.weights(), pool="avg")

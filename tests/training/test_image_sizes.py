"""Engines at another image size than the weights', held against timm's model of that size, which
loads the same weights by timm's own filter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import save_file
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos

from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.exporting import export
from tocom_export.loading import load_model
from tocom_export.model.spec import VitSpec
from tocom_export.training.building import vit_from_spec
from tocom_export.training.timm_models import spec_of_name

# timm's interpolator of tables, by torch's ways of indexing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.searchsorted", "ignore:Using a non-tuple sequence"
)
FILTERS: dict[str, Any] = {
    "vit": vision_transformer, "eva": eva, "beit": beit, "relpos": vision_transformer_relpos,
}  # fmt: skip
NAMES = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",  # registers, no positions for the prefix
    "vit_base_patch16_siglip_224",  # no prefix
    "eva02_tiny_patch14_224",  # learned and rotary positions, these scaled to a grid
    "vit_small_patch16_dinov3",  # rotary ones alone
    "vit_small_patch16_rope_mixed_224",  # rotary ones whose frequencies are weights
    "beit_base_patch16_224",  # tables of relative positions
    "vit_relpos_base_patch16_cls_224",  # relative positions by an MLP
)
RESIZED: list[Any] = [((6, 6), (9, 9)), ((6, 6), (4, 4)), ((6, 6), (3, 8))]
CASES = [(name, *grids) for name in NAMES for grids in (*RESIZED, ((4, 7), (6, 6)))]
CASES.remove(("beit_base_patch16_224", (4, 7), (6, 6)))  # timm takes tables for those of a square


def shrink(spec: VitSpec, grid: tuple[int, int]) -> VitSpec:
    width = 2 * spec.head_width
    return replace(
        spec,
        image_size=(grid[0] * spec.patch_size[0], grid[1] * spec.patch_size[1]),
        depth=2,
        width=width,
        heads=2,
        classes=7,
        mlp_width=2 * width,
        pool_heads=2 if spec.pool_heads else 0,
        pool_mlp_width=width if spec.pool_mlp_width else 0,
    )


def perturb(vit: torch.nn.Module) -> None:
    """Weights that leave nothing at one or zero, where a mistake would hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in vit.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "pos_embed" in name or "relative" in name:
                weight.copy_(noise)
            elif not name.endswith("freqs"):
                weight.add_(noise * 0.08)


def agree(found: Any, wanted: Any) -> bool:
    return bool(np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("name", "old", "new"), CASES, ids=str)
def test_engines_agree_with_timm(
    tmp_path: Path, make_images: Callable[..., Any], name: str, old: Any, new: Any
):
    spec, resized = (shrink(spec_of_name(name), grid) for grid in (old, new))
    vit, wider = vit_from_spec(spec), vit_from_spec(resized)
    perturb(vit)
    wider.pretrained_cfg = {"input_size": (3, *spec.image_size)}
    state = FILTERS[spec.family].checkpoint_filter_fn(vit.state_dict(), wider)
    wider.load_state_dict(state)

    weights = {key: tensor.numpy() for key, tensor in vit.state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors", to_metadata(ModelInfo(spec)))
    bundle = export(
        checkpoint=tmp_path / "w.safetensors",
        out=tmp_path / "bundle",
        image_size=resized.image_size,
        bank="none",
        targets=[0],
        verify=False,
    )
    assert bundle.spec == resized
    images = make_images(resized, 2)
    with torch.inference_mode():
        wanted = wider.eval()(torch.from_numpy(images)).numpy()
    assert agree(bundle.engine("r00", threads=1).run(images), wanted)
    # What was written says what it is of.
    again = load_model(checkpoint=bundle.path / "weights.safetensors")
    assert (again.spec, again.resampled) == (resized, "")


@pytest.mark.parametrize(("old", "new"), [((4, 7), (6, 6)), ((3, 8), (5, 5))], ids=str)
def test_tables_of_no_square(tmp_path: Path, make_images: Callable[..., Any], old: Any, new: Any):
    """timm resizes them where the model is there already."""
    spec, resized = (shrink(spec_of_name("beit_base_patch16_224"), grid) for grid in (old, new))
    vit: Any = vit_from_spec(spec)
    perturb(vit)
    weights = {key: tensor.numpy().copy() for key, tensor in vit.state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors", to_metadata(ModelInfo(spec)))
    vit.set_input_size(img_size=resized.image_size)
    bundle = export(
        checkpoint=tmp_path / "w.safetensors", out=tmp_path / "bundle", bank="none", targets=[0],
        image_size=resized.image_size, verify=False,
    )  # fmt: skip
    images = make_images(resized, 2)
    with torch.inference_mode():
        wanted = vit.eval()(torch.from_numpy(images)).numpy()
    assert agree(bundle.engine("r00", threads=1).run(images), wanted)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 320),
        ("vit_tiny_patch16_224", (64, 160)),
        ("deit_tiny_distilled_patch16_224", 96),
        ("vit_small_patch14_reg4_dinov2", 126),
        ("eva02_tiny_patch14_224", (98, 280)),
    ],
)
def test_a_bare_file_of_a_named_model(
    tmp_path: Path, make_images: Callable[..., Any], name: str, size: Any
):
    """What ``create_model(name, pretrained=True, img_size=...)`` makes of the same weights."""
    vit: Any = timm.create_model(name, num_classes=5)
    perturb(vit)
    state = vit.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    overlay = {"state_dict": state, "num_classes": 5}
    timm_s: Any = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size, num_classes=5
    )
    bundle = export(
        name, tmp_path / "bundle", checkpoint=tmp_path / "weights.pth", image_size=size,
        bank="none", targets=[0], verify=False,
    )  # fmt: skip
    assert bundle.spec.image_size == (size if isinstance(size, tuple) else (size, size))
    images = make_images(bundle.spec, 1)
    with torch.inference_mode():
        wanted = timm_s.eval()(torch.from_numpy(images)).numpy()
    assert agree(bundle.engine("r00", threads=1).run(images), wanted)

"""timm models made with another image size, pooling or head, built from their bare state dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.method import Method
from tocom_export.errors import InputError
from tocom_export.exporting import export
from tocom_export.loading import load_model
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.training.model import CompressedVit

FORMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {"img_size": 320, "num_classes": 7}, {}),
    ("vit_small_patch16_224", {"img_size": 96, "global_pool": "avg"}, {}),
    ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg", "num_classes": 0}, {}),
    ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg", "fc_norm": False},
     {"pool": "avg"}),
    ("vit_tiny_patch16_224", {"img_size": 64, "fc_norm": True}, {"pool": "token"}),
    ("vit_tiny_patch16_224", {"img_size": (48, 160)}, {"image_size": (48, 160)}),
    ("deit_tiny_distilled_patch16_224", {"img_size": 128, "num_classes": 5}, {}),
    ("deit3_small_patch16_224", {"img_size": 80}, {}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 126, "num_classes": 4}, {}),
]  # fmt: skip
"""A name, what timm is told beside it, and what has to be said of the file."""


def make(name: str, told: dict[str, Any], folder: Path) -> tuple[Any, Path]:
    """A timm model of random weights, none of which is zero, and its state dict's file."""
    torch.manual_seed(0)
    vit: Any = timm.create_model(name, **told).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    torch.save(vit.state_dict(), folder / "weights.pth")
    return vit, folder / "weights.pth"


@pytest.mark.parametrize(("name", "told", "given"), FORMS, ids=str)
def test_the_spec_and_the_logits_are_timm_s(
    tmp_path: Path, make_images: Callable[..., Any], name: str, told: Any, given: Any
):
    vit, file = make(name, told, tmp_path)
    spec = load_model(name, file, **given).spec
    assert spec == spec_from_timm(vit)
    images = make_images(spec, 2)
    bundle = export(
        name,
        tmp_path / "bundle",
        checkpoint=file,
        bank="none",
        targets=[0, 8],
        verify=False,
        **given,
    )
    x = torch.from_numpy(images)
    with torch.inference_mode():
        compressed = CompressedVit(vit, Method("tome"))(x, 8).numpy()
        exact = vit.double()(x.double()).numpy()
    for variant, wanted in (("r00", exact), ("r08", compressed)):
        found = bundle.engine(variant, threads=1).run(images)
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert Bundle.open(bundle.path).spec == spec
    # What was written says what it is.
    assert load_model(checkpoint=bundle.path / "weights.safetensors").spec == spec


def test_what_the_tensors_leave_open_is_asked_for(tmp_path: Path):
    name = "vit_tiny_patch16_224"
    _, file = make(name, {"img_size": (48, 160)}, tmp_path)
    with pytest.raises(InputError, match="30 patches, which are no square: `image_size` HxW"):
        load_model(name, file)
    with pytest.raises(InputError, match="no square, nor images of 320x320: `image_size` HxW"):
        export(name, tmp_path / "bundle", checkpoint=file, bank="none", image_size=320)
    assert not (tmp_path / "bundle").exists()


def test_a_training_script_s_checkpoint(tmp_path: Path, make_images: Callable[..., Any]):
    """What timm's own loading makes of the same file: averaged weights of a compiled model."""
    name = "vit_tiny_patch16_224"
    vit, _ = make(name, {"img_size": 64, "num_classes": 7}, tmp_path)
    state = vit.state_dict()
    file = tmp_path / "model_best.pth.tar"
    torch.save(
        {
            "epoch": 3, "arch": name, "metric": 80.0,
            "state_dict": {f"_orig_mod.{n}": torch.zeros_like(t) for n, t in state.items()},
            "state_dict_ema": {f"module._orig_mod.{n}": t for n, t in state.items()},
        },
        file,
    )  # fmt: skip
    bundle = export(name, tmp_path / "bundle", checkpoint=file, bank="none", targets=[0])
    fresh: Any = timm.create_model(name, img_size=64, num_classes=7, checkpoint_path=str(file))
    images = make_images(bundle.spec, 2)
    with torch.inference_mode():
        wanted = fresh.eval()(torch.from_numpy(images)).numpy()
    found = bundle.engine("r00").run(images)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    plain = export(
        name,
        tmp_path / "plain",
        checkpoint=file,
        weights_key="state_dict",
        bank="none",
        targets=[0],
    )
    assert np.abs(plain.engine("r00").run(images)).max() == 0

"""Random models of each kind in transformers, saved, read by us, and run by both.

Then our engine is refitted from other weights, in a file without a config beside it. Every
parameter is drawn anew, so that none is at a value that hides a mistake (a zero bias, a norm of
ones). Needs transformers, which the package doesn't:

    pip install transformers && python scripts/check_huggingface.py [KIND ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor

from tocom_export import export, refit
from tocom_export.loading import load_model
from tocom_export.training.building import vit_from_spec
from tocom_export.training.model import CompressedVit

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 48, "patch_size": 8,
}  # fmt: skip
WIDE = {"image_size": [32, 48], "patch_size": [8, 4]}
RATIO = {**SIZES, "mlp_ratio": 2}
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 50,
}  # fmt: skip
RELATIVE = {
    "use_relative_position_bias": True, "use_absolute_position_embeddings": True,
    "use_mean_pooling": False,
}  # fmt: skip
CLIP = {"vision_config": SIZES, "text_config": TEXT, "projection_dim": 24}
SIGLIP = {"vision_config": SIZES, "text_config": TEXT}
TOLERANCE = 2e-5
"""Of the largest output."""

Read = Callable[[Any, Tensor], Tensor]
logits: Read = lambda model, images: model(images).logits  # noqa: E731
first: Read = lambda model, images: model(images).last_hidden_state[:, 0]  # noqa: E731
pooled: Read = lambda model, images: model(images).pooler_output  # noqa: E731
embeds: Read = lambda model, images: model(images).image_embeds  # noqa: E731


def features(model: Any, images: Tensor) -> Tensor:
    """Of a model of images and texts."""
    out = model.get_image_features(images)
    return out if isinstance(out, Tensor) else out.pooler_output


def unmasked(model: Any, images: Tensor) -> Tensor:
    """A masked autoencoder's class token, once nothing is masked."""
    return model.vit(images).last_hidden_state[:, 0]


CASES: dict[str, tuple[str, str, dict[str, Any], Read]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, "num_labels": 7}, logits),
    "vit-bare": ("ViTModel", "ViTConfig", {**SIZES, "qkv_bias": False}, first),
    "vit-wide": ("ViTForImageClassification", "ViTConfig", {**SIZES, **WIDE}, logits),
    "deit": ("DeiTForImageClassification", "DeiTConfig", SIZES, logits),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", SIZES, logits),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", RATIO, logits),
    "dinov2-bare": ("Dinov2Model", "Dinov2Config", RATIO, pooled),
    "dinov2-gated": ("Dinov2Model", "Dinov2Config", {**RATIO, "use_swiglu_ffn": True}, pooled),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", RATIO, logits,
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**SIZES, "num_register_tokens": 4}, pooled),
    "dinov3-gated": (
        "DINOv3ViTModel", "DINOv3ViTConfig",
        {**SIZES, "use_gated_mlp": True, "hidden_act": "silu", "key_bias": True}, pooled,
    ),
    "dinov3-wide": ("DINOv3ViTModel", "DINOv3ViTConfig", {**SIZES, **WIDE}, pooled),
    "clip": ("CLIPForImageClassification", "CLIPConfig", CLIP, logits),
    "clip-whole": ("CLIPModel", "CLIPConfig", CLIP, features),
    "clip-bare": ("CLIPVisionModel", "CLIPVisionConfig", SIZES, pooled),
    "clip-projection": (
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**SIZES, "projection_dim": 24},
        embeds,
    ),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", SIGLIP, logits),
    "siglip-whole": ("SiglipModel", "SiglipConfig", SIGLIP, features),
    "siglip-bare": ("SiglipVisionModel", "SiglipVisionConfig", SIZES, pooled),
    "beit": ("BeitForImageClassification", "BeitConfig", {**SIZES, **RELATIVE}, logits),
    "beit-bare": (
        "BeitModel", "BeitConfig",
        {**SIZES, "use_relative_position_bias": True, "use_mask_token": True}, pooled,
    ),
    "beit-shared": (
        "BeitForImageClassification", "BeitConfig",
        {**SIZES, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0},
        logits,
    ),
    "beit-both": (
        "BeitModel", "BeitConfig",
        {**SIZES, **RELATIVE, "use_shared_relative_position_bias": True}, pooled,
    ),
    "beit-absolute": (
        "BeitForImageClassification", "BeitConfig",
        {**SIZES, "use_absolute_position_embeddings": True}, logits,
    ),
    "data2vec": (
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig",
        {**SIZES, "use_relative_position_bias": True}, logits,
    ),
    "vit-mae": (
        "ViTMAEForPreTraining", "ViTMAEConfig",
        {**SIZES, "mask_ratio": 0.0, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1,
         "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}, unmasked,
    ),
}  # fmt: skip


def make_images(size: tuple[int, int], count: int = 2) -> Tensor:
    """Gradients, stripes and a disc: an image whose rows and columns differ."""
    axes = [torch.linspace(-1, 1, side) for side in size]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    disc = ((rows - 0.3) ** 2 + (columns + 0.2) ** 2 < 0.2).float()
    channels = torch.stack(
        [rows + disc, torch.sin(9 * columns) + 0.3 * rows, columns * rows - disc]
    )
    return torch.stack([channels * (1 + index) for index in range(count)])


def perturb(model: torch.nn.Module) -> None:
    """Draw every parameter anew: matrices as wide as they are, the rest around its value."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        matrix = parameter.ndim in (2, 4) and min(parameter.shape[:2]) > 2
        with torch.no_grad():
            if matrix:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * noise)


def check(case: str) -> list[str]:
    """Differences of our PyTorch model and of our engine, relative; why there is no engine."""
    model_class, config_class, sizes, read = CASES[case]
    torch.manual_seed(sum(map(ord, case)))
    model = getattr(hf, model_class)(getattr(hf, config_class)(**sizes)).eval()
    perturb(model)
    with TemporaryDirectory() as place, torch.no_grad():
        folder = Path(place, case)
        model.save_pretrained(folder)
        loaded = load_model(checkpoint=folder)
        images = make_images(loaded.spec.image_size)
        expected = read(model, images)
        assert float(expected.std(0).max()) > 1e-2, "both images have the same output"
        ours = vit_from_spec(loaded.spec)
        state = {
            name: torch.from_numpy(np.array(tensor))
            for name, tensor in loaded.checkpoint.tensors.items()
        }
        ours.load_state_dict(state)
        found = [("timm", ours(images))] if loaded.spec.pool != "token_avg" else []
        found.append(("PyTorch", CompressedVit(ours, name=case)(images)))
        bundle = export(
            checkpoint=folder, bank="none", targets=[0], out=Path(place, "bundle"), verify=False
        )
        engine = bundle.engine("r00")
        found.append(("ONNX", torch.from_numpy(np.array(engine.run(images.numpy())))))
        perturb(model)
        model.save_pretrained(Path(place, "other"))
        bare = Path(place, "weights.safetensors")
        Path(place, "other", "model.safetensors").rename(bare)
        again = refit(bundle, checkpoint=bare, verify=False).bundle.engine("r00")
        after = read(model, images)
        assert float((after - expected).abs().max() / expected.abs().max()) > 1e-2, "not perturbed"
        refitted = torch.from_numpy(np.array(again.run(images.numpy())))
    lines = []
    compared = [(name, got, expected) for name, got in found] + [("refitted", refitted, after)]
    for name, got, wanted in compared:
        assert got.shape == wanted.shape, (case, name, got.shape, wanted.shape)
        far = float((got - wanted).abs().max() / wanted.abs().max())
        lines.append(f"{name} {far:.1e}" + ("" if far <= TOLERANCE else " FAILS"))
    return lines


def main(cases: list[str]) -> int:
    """Check the cases, and print how far each is."""
    failed = 0
    for case in cases or CASES:
        try:
            lines = check(case)
        except Exception as error:
            lines = [f"FAILS: {type(error).__name__}: {error}"]
        failed += any("FAILS" in line for line in lines)
        print(f"{case:18}", ", ".join(lines), flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

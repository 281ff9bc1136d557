"""How others write the model as an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tocom_export.model.spec import VitSpec


def export_by_torch(vit: Any, spec: VitSpec, file: Path) -> None:
    """``torch.onnx.export``, for any batch."""
    import torch

    images = torch.zeros(2, spec.channels, *spec.image_size)
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(vit, (images,), file, dynamo=True, dynamic_shapes=({0: batch},))


def export_by_optimum(vit: Any, spec: VitSpec, file: Path) -> None:
    """Optimum's exporter, as its command line calls it on a timm model."""
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.model_configs import TimmDefaultOnnxConfig
    from transformers import PretrainedConfig

    for module in vit.modules():  # timm's exportable=True, which it loads models with
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    vit.config = PretrainedConfig(input_size=[spec.channels, *spec.image_size])
    export(vit, TimmDefaultOnnxConfig(vit.config, task="image-classification"), file)


EXPORTERS: dict[str, tuple[tuple[str, ...], Callable[[Any, VitSpec, Path], None]]] = {
    "torch.onnx.export": (("onnxscript",), export_by_torch),
    "Optimum's export": (("optimum", "optimum.exporters.onnx", "transformers"), export_by_optimum),
}
"""Name → packages that it needs, and how it is called: (timm model, spec, file)."""

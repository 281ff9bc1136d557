"""A bundle's model in PyTorch: as it is, compiled, and merging as it is commonly written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from tocom_export.bundle.opening import Bundle
from tocom_export.study.accuracy import Run

from ..scatter_merge import ScatterMergeVit
from ..torch_engine import load_shared, make_runner


def has_bfloat16(device: str) -> bool:
    """Whether it has instructions for bfloat16; without them it would be slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return bool(torch.cpu._is_avx512_bf16_supported())
    found = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # x86's, Arm's
    return any(found.get(name) for name in names)


def open_torch(
    place: Path,
    kind: Literal["eager", "compiled", "scatter"],
    precision: str,
    variant: str,
    device: str,
    threads: int | None,
) -> Run:
    """A bundle's model, uncompensated, its weights and images cast to the precision.

    On a processor with AVX-512 BF16, DeiT-S cast to it takes 3 to 12 % less time than under
    autocast at batch 1, as much at batch 8, and half the memory. Compiled for a fixed batch, or
    with its weights frozen, it is not faster by more than 1 %.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # as our engines; products are not rounded anyway
    bundle = Bundle.open(place)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    vit = load_shared(bundle).vit.to(device, dtype)
    if kind == "scatter":
        merging = ScatterMergeVit(vit, bundle.method, bundle.spec.model)
        return make_runner(merging, bundle.variant(variant).degrees)
    model: Any = torch.compile(vit) if kind == "compiled" else vit
    return make_runner(model)

"""What the benchmarks share: models with weights in which all tensors differ, and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tocom_export.compression.bank import ToComBank
from tocom_export.compression.method import Method
from tocom_export.training.building import vit_from_spec
from tocom_export.training.timm_models import spec_of_name

Row = tuple[str, str, str]
"""What was measured, the outcome, the bar."""


def make_checkpoint(model: str, folder: Path) -> Path:
    """A timm model's checkpoint; random weights, perturbed so that no two tensors are alike."""
    file = folder / f"{model}.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        vit = vit_from_spec(spec_of_name(model))
        for tensor in vit.parameters():
            tensor.data.add_(torch.randn(tensor.shape) * 0.02)
        save_file(vit.state_dict(), file)
    return file


def make_bank(model: str, folder: Path) -> Path:
    """A random bank of rank 2 for that model."""
    file = folder / f"{model}-bank.safetensors"
    if not file.exists():
        spec = spec_of_name(model)
        rng = np.random.default_rng(0)
        down, up = (spec.depth, 16, 2, spec.width), (spec.depth, 16, spec.width, 2)
        factors = [(rng.standard_normal(s) * 0.05).astype(np.float32) for s in (down, up) * 2]
        ToComBank(*factors, method=Method("tome"), model=model).save(file)
    return file


def build_bundle(model: str, folder: Path, targets: Iterable[int]) -> Path:
    """A bundle of those two, its variants r00, r04, ..."""
    out = folder / f"{model}-bundle"
    subprocess.run(
        ["tocom-export", "build", "--model", model, "--checkpoint", make_checkpoint(model, folder),
         "--bank", make_bank(model, folder), "--targets", ",".join(map(str, targets)), "--out", out,
         "--no-verify", "--quiet"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return out


@contextmanager
def start_server(bundle: Path, *options: str) -> Iterator[str]:
    """``tocom-export serve`` of a bundle, as a model called ``m``; its address."""
    line = [sys.executable, "-m", "tocom_export.cli.main", "serve", f"m={bundle}"]
    line += ["--port", "0", "-q", *options]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = next(said for said in process.stdout if said.startswith("Serving "))
        yield said.split("//")[1].strip()
    finally:
        process.terminate()
        process.wait()


def describe_machine() -> str:
    """Processor, threads and the versions that a figure depends on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    packages = ("torch", "timm", "onnx", "onnx_ir", "onnxruntime", "safetensors", "numpy")
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    return f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"

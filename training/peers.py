"""What a PyTorch user would run instead of our engines, to be timed beside them.

python -m tocom_export.training.peers PLACE KIND VARIANT DEVICE SHAPE [THREADS] runs one of them on
zeros of a shape such as 8,3,224,224, and prints the memory that its process takes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import DeviceError, brief
from tocom_export.io.memory import measure_memory, read_memory
from tocom_export.loading import is_installed
from tocom_export.model.spec import VitSpec
from tocom_export.study.accuracy import Run

Device = Literal["cpu", "cuda"]
Kind = Literal["eager", "compiled", "scatter", "file"]


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


@dataclass
class Peer:
    """One of them, ready to be timed."""

    name: str
    backend: str
    """``torch``, or ``onnx`` for what others export."""
    variant: str
    """The bundle's variant whose tokens it keeps; ``r00`` is the dense model."""
    run: Run
    memory: Callable[[int], int | None]
    """Batch → bytes that a process takes which runs it and nothing else."""


def open_peers(
    bundle: Bundle, device: Device, threads: int | None, folder: Path, tell: Callable[[str], None]
) -> Iterator[Peer | str]:
    """Each of them on the bundle's uncompensated weights; for one that can't be had, why not.

    The dense model in torch and compiled by it, merging as it is commonly written in the variant
    that costs least, and the dense model exported by torch and by Optimum, in ONNX Runtime as it
    comes. All compute in float32, and are named so where the bundle does not.

    Args:
        threads: of each; None leaves it to torch and to ONNX Runtime.
        folder: for what is exported.
        tell: called with what comes next.
    """
    if not is_installed("torch", "timm"):
        yield "torch and timm are not installed: there is nothing to compare with."
        return

    from .torch_engine import load_shared

    image = (bundle.spec.channels, *bundle.spec.image_size)
    limit = () if threads is None else (threads,)

    def try_peer(name: str, kind: Kind, place: Path, variant: str = "r00") -> Peer | str:
        def measure(batch: int) -> int | None:
            shape = ",".join(map(str, (batch, *image)))
            return measure_memory("tocom_export.training.peers", (*arguments, shape, *limit))

        name += ", fp32" * (bundle.precision != "fp32")
        tell(name)
        arguments = (place, kind, variant, device)
        try:
            run = open_run(*arguments, threads)
            run(np.zeros((1, *image), np.float32))
        except Exception as error:  # another library's; of the compiler, the lack of one
            return f"{name}: {brief(error)}"
        return Peer(name, "onnx" if kind == "file" else "torch", variant, run, measure)

    yield try_peer("torch eager, dense", "eager", bundle.path)
    yield try_peer("torch.compile, dense", "compiled", bundle.path)
    schedules = {name: v.schedule(bundle.spec) for name, v in bundle.variants.items()}
    least = min(schedules, key=lambda name: schedules[name].macs(bundle.spec))
    if bundle.method.name == "tome" and any(schedules[least].removed) and bundle.spec.prefix <= 1:
        yield try_peer(f"torch eager, merging by scatter, {least}", "scatter", bundle.path, least)
    for name, (needs, export) in EXPORTERS.items():
        if not is_installed(*needs):
            yield f"{name}: {needs[0]} is not installed."
            continue
        tell(name)
        quiet = StringIO()
        file = folder / f"{export.__name__}.onnx"
        try:
            with warnings.catch_warnings(), redirect_stdout(quiet), redirect_stderr(quiet):
                warnings.simplefilter("ignore")
                export(load_shared(bundle).vit, bundle.spec, file)
        except Exception as error:  # another library's, of a model that it may not take
            yield f"{name}: {brief(error)}"
        else:
            yield try_peer(f"{name}, ONNX Runtime, dense", "file", file)


def open_run(place: Path, kind: Kind, variant: str, device: Device, threads: int | None) -> Run:
    """One of them, of a bundle, or of an ONNX file; ``scatter`` at a variant's degrees."""
    if kind == "file":
        return _open_file(place, device, threads)
    import torch

    from .scatter_merge import ScatterMergeVit
    from .torch_engine import load_shared, make_runner

    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # as our engines; products are not rounded anyway
    bundle = Bundle.open(place)
    vit = load_shared(bundle).vit.to(device)
    if kind == "scatter":
        merging = ScatterMergeVit(vit, bundle.method, bundle.spec.model)
        return make_runner(merging, bundle.variant(variant).degrees)
    model: Any = torch.compile(vit) if kind == "compiled" else vit
    return make_runner(model)


def _open_file(file: Path, device: Device, threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As it comes but for this: threads that spin on would slow what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    provider: Any = "CPUExecutionProvider"
    if device == "cuda":
        provider = ("CUDAExecutionProvider", {"use_tf32": "0"})
    session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise DeviceError("this ONNX Runtime has no CUDA; onnxruntime-gpu has")
    (name,) = (entry.name for entry in session.get_inputs())
    return lambda images: np.asarray(session.run(None, {name: images})[0])


def main() -> None:
    """Run one of them once, and print what that took."""
    place, kind, variant, device, shape, *threads = sys.argv[1:]
    limit = int(threads[0]) if threads else None
    run = open_run(Path(place), kind, variant, device, limit)  # type: ignore[arg-type]
    run(np.zeros([int(size) for size in shape.split(",")], np.float32))
    print(read_memory())


if __name__ == "__main__":
    main()

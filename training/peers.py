"""What a user would run instead of our engines, to be timed beside them.

python -m tocom_export.training.peers PLACE KIND DEGREE DEVICE SHAPE [THREADS] runs one of them on zeros
of a shape such as 8,3,224,224, and prints the memory that its process takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tocom_export.bundle.opening import WEIGHTS, Bundle
from tocom_export.cli.output import installed
from tocom_export.errors import ProviderError, brief
from tocom_export.io.memory import memory_of, own_memory

from .exporters import EXPORTERS

Images = npt.NDArray[np.float32]
Run = Callable[[Images], npt.NDArray[Any]]
Device = Literal["cpu", "cuda"]
Kind = Literal["eager", "compiled", "usual", "file"]


@dataclass(frozen=True)
class Peer:
    """One of them, ready to be timed."""

    name: str
    degree: int
    run: Run
    memory: Callable[[int], int | None]
    """Batch → bytes that a process takes which runs it and nothing else."""


def peers(
    bundle: Bundle, device: Device, threads: int | None, folder: Path, tell: Callable[[str], None]
) -> Iterator[Peer | str]:
    """Each of them on the bundle's uncompensated weights; for one that can't be had, why not.

    The dense model in torch and compiled by it, merging as it is commonly written at the highest
    degree, and the dense model exported by torch and by Optimum, in ONNX Runtime as it comes. All
    compute in float32, and are named so where the bundle does not.

    Args:
        threads: of each; None leaves it to torch and to ONNX Runtime.
        folder: for what is exported.
        tell: called with a word before what takes long.
    """
    if not installed("torch", "timm"):
        yield "torch and timm are not installed: there is nothing to compare with."
        return

    image = (bundle.spec.channels, *bundle.spec.image_size)

    def peer(name: str, kind: Kind, place: Path, degree: int = 0) -> Peer | str:
        name += ", fp32" * (bundle.precision != "fp32")
        tell(name)
        arguments = (place, kind, degree, device)
        try:
            run = open_peer(*arguments, threads)
            run(np.zeros((1, *image), np.float32))
        except Exception as error:  # another library's; of the compiler, the lack of one
            return f"{name}: {brief(error)}"
        return Peer(name, degree, run, partial(_memory, arguments, image, threads))

    yield peer("torch eager, dense", "eager", bundle.path)
    yield peer("torch.compile, dense", "compiled", bundle.path)
    most = max(bundle.targets)
    if bundle.method.name == "tome" and most and bundle.spec.prefix <= 1:
        yield peer(f"torch eager, usual merging, r = {most}", "usual", bundle.path, most)
    for name, (needs, export) in EXPORTERS.items():
        if not installed(*needs):
            yield f"{name}: {needs[0]} is not installed."
            continue
        tell(name)
        file = folder / f"{export.__name__}.onnx"
        try:
            export(_dense(bundle), bundle.spec, file)
        except Exception as error:  # another library's, of a model that it may not take
            yield f"{name}: {brief(error)}"
        else:
            yield peer(f"{name}, ONNX Runtime, dense", "file", file)


def open_peer(place: Path, kind: Kind, degree: int, device: Device, threads: int | None) -> Run:
    """One of them, from normalised images (B, C, H, W) to logits (B, classes).

    Args:
        place: a bundle; for ``file``, an ONNX file.
    """
    if kind == "file":
        return _in_onnxruntime(place, device, threads)
    import torch

    from .scatter_merge import UsualVit

    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # as our engines; products are not rounded anyway
    bundle = Bundle.open(place)
    model: Any = _dense(bundle)
    if kind == "usual":
        model = UsualVit(model, bundle.method, bundle.spec.model).eval()
    model = model.to(device)
    if kind == "compiled":
        model = torch.compile(model)
    arguments = (degree,) if kind == "usual" else ()

    @torch.inference_mode()
    def run(images: Images) -> npt.NDArray[Any]:
        logits: npt.NDArray[Any] = (
            model(torch.from_numpy(images).to(device), *arguments).cpu().numpy()
        )
        return logits

    return run


def _dense(bundle: Bundle) -> Any:
    """The bundle's model as timm has it, without compensation, on the CPU."""
    from tocom_export.compression.checkpoint import Checkpoint
    from tocom_export.graph.quantising import dequantize

    from .timm_models import vit_from_spec
    from .torch_engine import load_weights

    vit = vit_from_spec(bundle.spec)
    load_weights(vit, dequantize(Checkpoint.open(bundle.path / WEIGHTS).tensors))
    return vit.eval()


def _in_onnxruntime(file: Path, device: Device, threads: int | None) -> Run:
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
        raise ProviderError("this ONNX Runtime has no CUDA; onnxruntime-gpu has")
    (name,) = (entry.name for entry in session.get_inputs())
    return lambda images: np.asarray(session.run(None, {name: images})[0])


def _memory(
    arguments: tuple[object, ...], image: tuple[int, ...], threads: int | None, batch: int
) -> int | None:
    shape = ",".join(map(str, (batch, *image)))
    limit = () if threads is None else (threads,)
    return memory_of("tocom_export.training.peers", (*arguments, shape, *limit))


def main() -> None:
    """Run one of them once, and print what that took."""
    place, kind, degree, device, shape, *threads = sys.argv[1:]
    limit = int(threads[0]) if threads else None
    run = open_peer(Path(place), kind, int(degree), device, limit)  # type: ignore[arg-type]
    run(np.zeros([int(size) for size in shape.split(",")], np.float32))
    print(own_memory())


if __name__ == "__main__":
    main()

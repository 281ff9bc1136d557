"""What several test modules share: small models, weights, banks and images, made on the spot.

Fixtures that return a function stand in for imports, so no test module depends on another's
place. torch is imported only where a test asks for a PyTorch model.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.refitting import refit_bundle
from tocom_export.bundle.weights import ModelWeights
from tocom_export.bundle.writing import Blueprint
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.graph.precision import Precision
from tocom_export.io.json_codec import decode, encode
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant

# Models this small lose more by a second thread than they gain; read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Array = npt.NDArray[Any]

SMALL = VitSpec(
    model="small", image_size=(56, 56), patch_size=(8, 8), width=64, depth=4, heads=4,
    mlp_width=128, classes=10,
)  # fmt: skip
"""50 tokens; degree 16 leaves 34, 18, 10 and 6."""


TOME, IMAGENET = Method("tome"), Preprocess()


def _spec(**changes: Any) -> VitSpec:
    return decode(VitSpec, {**encode(SMALL), **changes})


def _weights(spec: VitSpec, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in spec.weights().items():
        noise = rng.standard_normal(shape, np.float32)
        if name.endswith(("token", "pos_embed")):
            weights[name] = noise * np.float32(0.5)
        elif len(shape) > 1:
            weights[name] = noise * np.float32(np.prod(shape[1:]) ** -0.5)
        else:
            weights[name] = noise * np.float32(0.1) + name.endswith((".weight", "gamma"))
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def _images(spec: VitSpec, batch: int = 2, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    height, width = spec.image_size
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = rng.uniform(-9, 9, (3, 4, batch, spec.channels, 1, 1))
    smooth = np.sin(waves[0] * y + waves[1] * x + waves[2]).sum(axis=0)
    return (smooth + 0.1 * rng.standard_normal(smooth.shape)).astype(np.float32)


def _bank(
    spec: VitSpec, rank: int = 2, seed: int = 0, groups: int = 16, method: str = "tome"
) -> ToComBank:
    rng = np.random.default_rng(seed)
    down, up = (spec.depth, groups, rank, spec.width), (spec.depth, groups, spec.width, rank)
    factors = (rng.normal(0, 0.3, shape).astype(np.float32) for shape in (down, up, down, up))
    return ToComBank(*factors, method=Method(method), model=spec.model)


def _checkpoint(
    folder: Path, spec: VitSpec, seed: int = 0, metadata: dict[str, str] | None = None
) -> Path:
    file = folder / "checkpoint.safetensors"
    save_file(_weights(spec, seed), file, metadata)
    return file


def _blueprint(
    folder: Path,
    spec: VitSpec = SMALL,
    *,
    bank: ToComBank | Literal["default"] | None = "default",
    method: Method = TOME,
    source: int = 0,
    targets: Sequence[int] = (0, 8, 16),
    schedules: Mapping[str, Sequence[int]] | None = None,
    scale: float = 0.1,
    preprocess: Preprocess = IMAGENET,
    classes: tuple[str, ...] | None = None,
    precision: Precision = "fp32",
) -> Blueprint:
    checkpoint = Checkpoint.open(_checkpoint(folder, spec))
    steps = _bank(spec) if bank == "default" else bank
    variants = [
        Variant.of(spec, degrees, name, source=source, scale=scale, compensated=steps is not None)
        for name, degrees in [*((None, t) for t in targets), *(schedules or {}).items()]
    ]
    return Blueprint(
        ModelWeights(checkpoint.check(spec), checkpoint, steps, precision),
        method,
        {variant.name: variant for variant in variants},
        preprocess,
        classes,
    )


def _vit(spec: VitSpec, seed: int = 0) -> Any:
    import torch

    from tocom_export.training.building import vit_from_spec

    vit = vit_from_spec(spec)
    vit.load_state_dict({n: torch.from_numpy(w) for n, w in _weights(spec, seed).items()})
    return vit


def _run_graph(file: Path, images: Array) -> Array:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images})
    return np.asarray(logits)


def _image_folder(
    folder: Path, classes: tuple[str, ...] = ("a", "b"), each: int = 6, size: int = 20
) -> Path:
    from PIL import Image

    rng = np.random.default_rng(len(classes))
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 128, (size, size, 3), np.uint8)
            pixels[..., label % 3] += 100
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., VitSpec]:
    """A small spec, with the given fields changed."""
    return _spec


@pytest.fixture(scope="session")
def make_weights() -> Callable[..., dict[str, Array]]:
    """Weights of a spec, no two tensors alike."""
    return _weights


@pytest.fixture(scope="session")
def make_images() -> Callable[..., npt.NDArray[np.float32]]:
    """A batch of smooth, slightly noisy images (B, C, H, W)."""
    return _images


@pytest.fixture(scope="session", autouse=True)
def machine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own: the user's is neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOCOM_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_bank() -> Callable[..., ToComBank]:
    """A bank of random factors."""
    return _bank


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """A checkpoint file with the weights of ``make_weights``."""
    return _checkpoint


@pytest.fixture(scope="session")
def make_blueprint() -> Callable[..., Blueprint]:
    """What a small bundle is made of: degrees 0, 8, 16 of a model with a bank."""
    return _blueprint


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., Any]:
    """The timm model of a spec, with the weights of ``make_weights``."""
    return _vit


@pytest.fixture(scope="session")
def run_graph() -> Callable[[Path, Array], Array]:
    """Logits of an ONNX file in ONNX Runtime."""
    return _run_graph


@pytest.fixture(scope="session")
def image_folder() -> Callable[..., Path]:
    """An ImageFolder of small PNG files, a colour per class."""
    return _image_folder


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pretended TensorRT (``trt``) and CUDA (``cuda``), imported in place of the real ones."""
    place = Path(__file__).parent / "engines" / "stand_in.py"
    spec = importlib.util.spec_from_file_location("stand_in", place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cuda = module.Cuda()
    trt, rtx = module.Trt(cuda), module.Trt(cuda, "1.7.1.116")
    bindings = SimpleNamespace(runtime=cuda)
    for name, part in {
        "tensorrt": trt, "tensorrt_rtx": rtx,
        "cuda": SimpleNamespace(bindings=bindings), "cuda.bindings": bindings,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, part)
    return SimpleNamespace(trt=trt, rtx=rtx, cuda=cuda)


@pytest.fixture(scope="session")
def refit_graph() -> Callable[..., Bundle]:
    """Other weights for one variant of a bundle's files."""

    def call(
        bundle: Bundle,
        variant: Variant,
        new: ModelWeights,
        check: Callable[[Bundle], None] = lambda _: None,
    ) -> Bundle:
        changes = (new, {variant.name: variant})
        return refit_bundle(bundle.path, lambda _: changes, lambda made, _: check(made))

    return call

"""Each peer of the model inside the package, in each precision, against the model in torch."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tocom_export.bundle.opening import Bundle
from tocom_export.engines.verify import sample_images
from tocom_export.exporting import export
from tocom_export.loading import is_installed as is_installed_here
from tocom_export.training.peers import opening, openvino_peers, torch_peers
from tocom_export.training.peers.exporting import export_by_torch
from tocom_export.training.peers.opening import Peer, open_peers
from tocom_export.training.peers.quantising import QUANTISERS, quantise_static
from tocom_export.training.peers.running import Images, open_run
from tocom_export.training.torch_engine import load_shared

pytest.importorskip("onnxscript")
pytest.importorskip("nncf")

Run = Callable[[Images], Images]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("reference") / "out"
    return export("reference", out, targets=[0, 8], verify=False)


@pytest.fixture(scope="module")
def images(bundle: Bundle) -> Images:
    return sample_images(bundle.spec, 64)


def rounds(
    run: Run, bundle: Bundle, images: Images, within: float, *, variant: str = "r00", same: float
) -> None:
    """It says what the model says, but for some rounding, at any batch.

    Args:
        within: what is left of the logits' variance; a hundredth of it must be, too.
        same: the share of images whose class is the same.
    """
    kind: Any = "eager" if variant == "r00" else "scatter"
    expected = open_run(bundle.path, kind, "fp32", variant, "cpu", 1)(images)
    logits = run(images)
    assert (logits.dtype, logits.shape) == (np.float32, expected.shape)
    left = 1 - np.corrcoef(logits.ravel(), expected.ravel())[0, 1]
    assert within / 100 < left < within
    assert (logits.argmax(1) == expected.argmax(1)).mean() >= same
    spread = 4 * np.abs(logits - expected).max()  # a batch may be rounded otherwise
    assert np.abs(run(images[:3]) - expected[:3]).max() < spread


def test_torch_in_bfloat16(bundle: Bundle, images: Images):
    run = open_run(bundle.path, "eager", "bf16", "r00", "cpu", 1)
    rounds(run, bundle, images, 1e-4, same=0.95)


def test_merging_in_bfloat16(bundle: Bundle, images: Images):
    """It may merge others where two are almost as similar."""
    run = open_run(bundle.path, "scatter", "bf16", "r08", "cpu", 1)
    rounds(run, bundle, images, 1e-2, variant="r08", same=0.9)


def test_what_is_compiled_is_cast(bundle: Bundle, images: Images, monkeypatch):
    compiled = []

    def compile(model: torch.nn.Module) -> torch.nn.Module:
        compiled.append({weight.dtype for weight in model.parameters()})
        return model

    monkeypatch.setattr(torch, "compile", compile)
    run = open_run(bundle.path, "compiled", "bf16", "r00", "cpu", 1)
    rounds(run, bundle, images, 1e-4, same=0.95)
    assert compiled == [{torch.bfloat16}]


@pytest.fixture(scope="module")
def others(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Peer | str]:
    """All that is quantised or run by OpenVINO, as `bench` opens it, by name."""
    told: list[str] = []
    folder = tmp_path_factory.mktemp("peers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "_open_torch", lambda opener: ())
        patch.setattr(opening, "EXPORTERS", {"torch": (("onnxscript",), export_by_torch)})
        patch.setattr(openvino_peers, "has_bfloat16", lambda: True)
        peers = open_peers(
            bundle, "cpu", 1, folder, told.append, images=sample_images(bundle.spec, 16)
        )
        found = list(peers)
    return {peer if isinstance(peer, str) else peer.name: peer for peer in found}


NAMES = {
    "torch, ONNX Runtime, dense, fp32": ("onnx", "fp32"),
    "ONNX Runtime, dense, int8 by its quantiser": ("onnx", "int8"),
    "ONNX Runtime, dense, int8 by its quantiser, dynamic": ("onnx", "int8"),
    "OpenVINO, dense, fp32": ("openvino", "fp32"),
    "OpenVINO, dense, bf16": ("openvino", "bf16"),
    "OpenVINO, dense, int8 by NNCF": ("openvino", "int8"),
}


def test_what_there_is(others: dict[str, Any]):
    assert list(others) == list(NAMES)
    for peer in others.values():
        assert (peer.backend, peer.precision) == NAMES[peer.name]
        assert peer.variant == "r00"


@pytest.mark.parametrize("name", [name for name in NAMES if "int8" in name])
def test_int8(others: dict[str, Any], bundle: Bundle, images: Images, name: str):
    """Top-1 as alike as int8 allows on images without a class."""
    rounds(others[name].run, bundle, images, 2e-3, same=0.85)


def test_float32_in_openvino(others: dict[str, Any], bundle: Bundle, images: Images):
    """Whatever the device would choose itself."""
    expected = open_run(bundle.path, "eager", "fp32", "r00", "cpu", 1)(images)
    logits = others["OpenVINO, dense, fp32"].run(images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)


def test_bfloat16_in_openvino(others: dict[str, Any], bundle: Bundle, images: Images):
    if not openvino_peers.has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    rounds(others["OpenVINO, dense, bf16"].run, bundle, images, 1e-4, same=0.95)


def test_logits_are_the_caller_s(others: dict[str, Any], images: Images):
    """The next run doesn't write over them."""
    run = others["OpenVINO, dense, fp32"].run
    first = run(images[:2])
    kept = first.copy()
    run(images[2:4])
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("quantise", [quantise_static, openvino_peers.quantise_by_nncf])
def test_ranges_are_those_of_the_images(
    bundle: Bundle, images: Images, tmp_path: Path, quantise: Callable[..., None]
):
    """Of much darker ones they are wrong."""
    kind: Any = "onnx" if quantise is quantise_static else "openvino"
    suffix = {"onnx": ".onnx", "openvino": ".xml"}[kind]
    source, file = tmp_path / f"source{suffix}", tmp_path / f"quantised{suffix}"
    vit = load_shared(bundle).vit
    with opening._hush():
        (export_by_torch if kind == "onnx" else openvino_peers.convert)(vit, bundle.spec, source)
        quantise(source, images[:4] * np.float32(0.01), file)
    expected = open_run(source, kind, "fp32", "r00", "cpu", 1)(images)
    logits = open_run(file, kind, "int8", "r00", "cpu", 1)(images)
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] < 0.99


INTERRUPTED = """
import signal, sys
import numpy as np, openvino
from openvino import opset8
from tocom_export.training.peers.openvino_peers import open_openvino

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
images = opset8.parameter([-1, 2], np.float32)
openvino.save_model(openvino.Model([opset8.relu(images)], [images]), sys.argv[1])
first, second = (open_openvino(sys.argv[1], "fp32", 1) for _ in range(2))
first(np.ones((1, 2), np.float32)), second(np.ones((1, 2), np.float32))
del first
del second
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_signals_arrive_after_models_of_openvino(tmp_path: Path):
    """Had each a core, the last to go would leave the stack for signals of one long gone."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "small.xml")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.parametrize("threads", [None, 2])
def test_how_openvino_is_asked(monkeypatch, tmp_path: Path, threads: int | None):
    """Once a batch."""
    import openvino

    asked = []
    compile = openvino.Core.compile_model

    def spy(core: object, model: Any, device: str, config: dict[str, Any]) -> object:
        asked.append((device, config, model.input(0).shape[0]))
        return compile(core, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    parameter = openvino.opset8.parameter([-1, 2], np.float32)
    model = openvino.Model([openvino.opset8.relu(parameter)], [parameter])
    openvino.save_model(model, tmp_path / "small.xml")
    limit = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    hints: dict[str, dict[str, str]] = {
        "fp32": {"INFERENCE_PRECISION_HINT": "f32"},
        "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
        "int8": {},
    }
    for precision, hint in hints.items():
        run = open_run(tmp_path / "small.xml", "openvino", precision, "", "cpu", threads)  # type: ignore[arg-type]
        for batch in (1, 3, 1):
            logits = run(np.full((batch, 2), 2, np.float32))
            assert (logits.shape, logits[0, 0]) == ((batch, 2), 2)
        config = {"PERFORMANCE_HINT": "LATENCY", **hint, **limit}
        assert asked == [("CPU", config, 1), ("CPU", config, 3)]
        asked.clear()


def open_others(bundle: Bundle, folder: Path, lacking: str, patch: pytest.MonkeyPatch) -> list[Any]:
    """Without torch's own, and without a package."""

    def is_installed(*packages: str) -> bool:
        return lacking not in packages and is_installed_here(*packages)

    def write(*arguments: Any) -> None:
        arguments[-1].write_bytes(b"")

    write.__name__ = export_by_torch.__name__  # by which its file is found
    patch.setattr(opening, "is_installed", is_installed)
    patch.setattr(opening, "_open_torch", lambda opener: ())
    patch.setattr(opening, "EXPORTERS", {"torch": (("onnxscript",), write)})
    patch.setattr(opening, "open_run", lambda *_: lambda images: images)
    patch.setattr(opening, "QUANTISERS", dict.fromkeys(QUANTISERS, write))
    patch.setattr(openvino_peers, "convert", write)
    patch.setattr(openvino_peers, "quantise_by_nncf", write)
    images = sample_images(bundle.spec, 1)
    return list(open_peers(bundle, "cpu", 1, folder, lambda _: None, images=images))


BRINGS = "is not installed; pip install 'tocom-export[peers]' brings it"


def test_without_onnxscript(bundle: Bundle, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(openvino_peers, "has_bfloat16", lambda: True)
    first, *quantised, _, _, _ = open_others(bundle, tmp_path, "onnxscript", monkeypatch)
    assert first.startswith(f"torch: onnxscript {BRINGS}")
    assert quantised == [
        f"ONNX Runtime, dense, {how}: it starts from what torch.onnx.export writes."
        for how in QUANTISERS
    ]


def test_without_openvino(bundle: Bundle, monkeypatch, tmp_path: Path):
    *_, line = open_others(bundle, tmp_path, "openvino", monkeypatch)
    assert line.startswith(f"OpenVINO, dense: openvino {BRINGS}")


def test_without_nncf_and_bfloat16(bundle: Bundle, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(openvino_peers, "has_bfloat16", lambda: False)
    *_, fp32, bf16, int8 = open_others(bundle, tmp_path, "nncf", monkeypatch)
    assert fp32.name == "OpenVINO, dense, fp32"
    assert bf16 == "OpenVINO, dense, bf16: this device has no instructions for bfloat16."
    assert int8.startswith(f"OpenVINO, dense, int8 by NNCF: nncf {BRINGS}")


def test_a_model_that_openvino_refuses(bundle: Bundle, monkeypatch, tmp_path: Path):
    def convert(*_: object) -> None:
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(openvino_peers, "convert", convert)
    opener = opening._Opener(
        bundle, "cpu", 1, tmp_path, lambda _: None, sample_images(bundle.spec, 1), (1,)
    )
    assert list(opening._open_openvino(opener)) == ["OpenVINO, dense: no such operator"]


def test_beside_a_gpu(bundle: Bundle, monkeypatch, tmp_path: Path):
    """What runs on processors alone isn't opened."""
    monkeypatch.setattr(opening, "_open_torch", lambda opener: ())
    monkeypatch.setattr(opening, "EXPORTERS", {})
    images = sample_images(bundle.spec, 1)
    assert not list(open_peers(bundle, "cuda", 1, tmp_path, lambda _: None, images=images))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
    ],
)
def test_what_processors_have(monkeypatch, found: dict[str, object], expected: bool):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert torch_peers.has_bfloat16("cpu") is expected


@pytest.mark.parametrize("expected", [True, False])
def test_what_gpus_and_an_older_torch_say(monkeypatch, expected: bool):
    def ask(including_emulation: bool = True) -> bool:
        return expected or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", ask)
    assert torch_peers.has_bfloat16("cuda") is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: expected)
    assert torch_peers.has_bfloat16("cpu") is expected


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_what_this_processor_has():
    """OpenVINO and PyTorch see what the kernel sees."""
    flags = Path("/proc/cpuinfo").read_text("utf-8").split()
    expected = bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    assert torch_peers.has_bfloat16("cpu") == expected
    assert openvino_peers.has_bfloat16() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it")
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_process_that_runs_one(others, bundle: Bundle, tmp_path: Path, monkeypatch, kind: str):
    """Without PyTorch in it; and nothing is left in the home folder."""
    for name in ("CI", "TF_BUILD", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = {"onnx": "int8 by its quantiser", "openvino": "int8 by NNCF"}[kind]
    (peer,) = (peer for peer in others.values() if peer.name.endswith(name))
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(opening, "measure_memory", lambda *arguments: asked.append(arguments))
    peer.memory(2)
    ((module, arguments),) = asked
    line = [sys.executable, "-m", str(module), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 20_000_000 < int(done.stdout) < 200_000_000
    assert not list(tmp_path.iterdir())

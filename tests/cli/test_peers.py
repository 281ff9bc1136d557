from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.metadata import ModelInfo, to_metadata
from tocom_export.compression.method import Method
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.verify import sample_images
from tocom_export.loading import is_installed
from tocom_export.model.spec import VitSpec
from tocom_export.training.peers import __main__ as measuring
from tocom_export.training.peers import opening as module
from tocom_export.training.peers import torch_peers
from tocom_export.training.peers.exporting import EXPORTERS, export_by_optimum, export_by_torch
from tocom_export.training.peers.opening import Peer, open_peers
from tocom_export.training.peers.quantising import quantise_dynamic
from tocom_export.training.peers.running import open_run

Run = Callable[..., Result]
Export = Callable[..., None]


@pytest.fixture
def plain(succeeds: Run, checkpoint: Path) -> Bundle:
    """A bundle without compensation."""
    options = ("--checkpoint", checkpoint, "--bank", "none", "--no-verify")
    succeeds("build", *options, "--targets", "0,4,8", "--out", "plain")
    return Bundle.open(Path("plain"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What takes long is left out; what processes would be started to measure memory.

    No device is asked whether it has bfloat16: all can compute in it.
    """
    asked: list[tuple[object, ...]] = []

    def measure_memory(*arguments: object) -> int:
        asked.append(arguments)
        return 1

    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(torch_peers, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(module, "QUANTISERS", {})
    monkeypatch.setattr(module, "_open_openvino", lambda opener: ())
    monkeypatch.setattr(module, "measure_memory", measure_memory)
    return asked


@pytest.fixture
def exporters(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Export]], None]:
    """Puts others in place of torch's and Optimum's."""

    def call(exporters: dict[str, Export]) -> None:
        found = {name: ((), export) for name, export in exporters.items()}
        monkeypatch.setattr(module, "EXPORTERS", found)

    return call


def found(bundle: Bundle, folder: Path, told: list[str] | None = None) -> list[Peer | str]:
    tell = (told if told is not None else []).append
    images = sample_images(bundle.spec, 4)
    return list(open_peers(bundle, "cpu", None, folder, tell, images=images, batches=(1, 2)))


def same(
    run: Callable, bundle: Bundle, variant: str, compensated: bool = True, within: float = 1e-4
) -> None:
    images = sample_images(bundle.spec, 8)
    expected = OnnxEngine(bundle, variant, threads=1, compensated=compensated).run(images)
    logits = run(images)
    assert (logits.dtype, logits.shape) == (np.float32, (8, 10))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=within)
    one = run(images[:1])
    np.testing.assert_allclose(one, expected[:1], rtol=0, atol=within)


def test_each_says_what_our_engine_says(plain: Bundle, quick, exporters, tmp_path: Path):
    exporters({})
    told: list[str] = []
    peers = found(plain, tmp_path, told)
    whats = {
        "torch eager, dense": "r00",
        "torch.compile, dense": "r00",
        "torch eager, merging by scatter, r08": "r08",
    }
    expected = {
        f"{what}, {precision}": (variant, precision)
        for what, variant in whats.items()
        for precision in ("fp32", "bf16")
    }
    for peer in peers:
        assert isinstance(peer, Peer)
        assert (peer.variant, peer.precision) == expected[peer.name]
        assert peer.backend == "torch"
        if peer.precision == "fp32":
            same(peer.run, plain, peer.variant)
    assert told == [peer.name for peer in peers] == list(expected)  # type: ignore[union-attr]


def test_a_device_without_bfloat16(plain: Bundle, quick, exporters, monkeypatch, tmp_path: Path):
    exporters({})
    monkeypatch.setattr(torch_peers, "has_bfloat16", lambda device: device != "cpu")
    peers = found(plain, tmp_path)
    assert [peer.precision for peer in peers if isinstance(peer, Peer)] == ["fp32"] * 3
    assert [peer for peer in peers if isinstance(peer, str)] == [
        f"{name}, bf16: this device has no instructions for bfloat16."
        for name in (
            "torch eager, dense", "torch.compile, dense", "torch eager, merging by scatter, r08"
        )
    ]  # fmt: skip


def test_weights_are_those_without_compensation(
    succeeds: Run, model, quick, exporters, tmp_path: Path
):
    """What one would write has no bank."""
    exporters({})
    succeeds("build", *model, "--targets", "0,8", "--out", "compensated")
    bundle = Bundle.open(Path("compensated"))
    eager, *_, scatter, _ = found(bundle, tmp_path)
    assert isinstance(eager, Peer)
    assert isinstance(scatter, Peer)
    for peer in (eager, scatter):
        same(peer.run, bundle, peer.variant, compensated=False)
    images = sample_images(bundle.spec, 8)
    assert np.abs(scatter.run(images) - OnnxEngine(bundle, "r08").run(images)).max() > 1e-2


def test_attention_is_what_the_bundle_s_is(
    succeeds: Run, spec: VitSpec, make_checkpoint: Callable, quick, exporters, tmp_path: Path
):
    """Not in proportion to the tokens' sizes, where it was trained so."""
    exporters({})
    metadata = to_metadata(ModelInfo(spec, 0, Method("tome", False)))
    file = make_checkpoint(tmp_path, spec, metadata=metadata)
    options = ("--checkpoint", file, "--bank", "none", "--no-verify", "--targets", "0,8")
    succeeds("build", *options, "--out", "other")
    bundle = Bundle.open(Path("other"))
    assert not bundle.method.proportional
    *_, scatter, _ = found(bundle, tmp_path)
    assert isinstance(scatter, Peer)
    same(scatter.run, bundle, "r08")


def test_merging_at_a_degree_per_layer(
    succeeds: Run, checkpoint: Path, quick, exporters, tmp_path: Path
):
    """Where the variant that costs least has one."""
    exporters({})
    options = ("--checkpoint", checkpoint, "--bank", "none", "--no-verify", "--targets", "0,4")
    succeeds("build", *options, "--schedule", "fast=8,4,1,0", "--out", "named")
    bundle = Bundle.open(Path("named"))
    *_, scatter, _ = found(bundle, tmp_path)
    assert isinstance(scatter, Peer)
    assert (scatter.variant, scatter.name[-12:]) == ("fast", ", fast, fp32")
    same(scatter.run, bundle, "fast")


@pytest.mark.parametrize("method", ["evit", "tome"])
def test_merging_where_there_is_none(
    succeeds: Run, checkpoint: Path, quick, exporters, tmp_path: Path, method: str
):
    """A model that prunes, and a bundle of degree 0 alone."""
    exporters({})
    targets = {"evit": "0,8", "tome": "0"}[method]
    options = ("--checkpoint", checkpoint, "--bank", "none", "--no-verify", "--method", method)
    succeeds("build", *options, "--targets", targets, "--out", "other")
    names = [peer.name for peer in found(Bundle.open(Path("other")), tmp_path)]  # type: ignore
    assert names == [
        f"{what}, dense, {precision}"
        for what in ("torch eager", "torch.compile")
        for precision in ("fp32", "bf16")
    ]


def test_what_torch_exports(plain: Bundle, quick, monkeypatch, tmp_path: Path, capfd):
    """Once, as it is, and for any batch."""
    pytest.importorskip("onnxscript")
    name = "torch.onnx.export"
    monkeypatch.setattr(module, "EXPORTERS", {name: EXPORTERS[name]})
    *_, exported = found(plain, tmp_path)
    assert isinstance(exported, Peer), exported
    assert exported.name == "torch.onnx.export, ONNX Runtime, dense, fp32"
    assert (exported.backend, exported.precision) == ("onnx", "fp32")
    same(exported.run, plain, "r00")
    assert EXPORTERS[name][1] is export_by_torch
    capfd.readouterr()

    exported.memory(4)
    ((started, arguments),) = quick
    assert started == "tocom_export.training.peers"
    monkeypatch.setattr(sys, "argv", [started, *map(str, arguments)])
    measuring.main()
    assert int(capfd.readouterr().out) > 20_000_000


def test_what_optimum_exports(plain: Bundle, quick, monkeypatch, tmp_path: Path):
    name = "Optimum's export"
    packages, export = EXPORTERS[name]
    assert export is export_by_optimum
    if not is_installed(*packages):
        pytest.skip("Optimum is not installed")
    monkeypatch.setattr(module, "EXPORTERS", {name: EXPORTERS[name]})
    *_, exported = found(plain, tmp_path)
    assert isinstance(exported, Peer), exported
    same(exported.run, plain, "r00")


def test_what_can_t_be_had_is_named(plain: Bundle, quick, monkeypatch, tmp_path: Path):
    def fails(*_: object) -> None:
        raise RuntimeError("no such operator\nand more")

    def broken(vit: object, spec: object, file: Path) -> None:
        file.write_bytes(b"no graph")

    def compile(model: object) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", compile)
    exporters = {
        "missing": (("no_such_package", "numpy"), fails),
        "dotted": (("no_such_package.part",), fails),
        "failing": ((), fails),
        "broken": ((), broken),
    }
    monkeypatch.setattr(module, "EXPORTERS", exporters)
    monkeypatch.setattr(module, "QUANTISERS", {"int8": fails})
    peers = found(plain, tmp_path)
    eager, _, compiled, cast, scatter, _, missing, dotted, failing, unreadable, quantised = peers
    assert isinstance(eager, Peer)
    assert isinstance(scatter, Peer)
    assert compiled == "torch.compile, dense, fp32: no compiler"
    assert cast == "torch.compile, dense, bf16: no compiler"
    assert missing == "missing: no_such_package is not installed."
    assert dotted == "dotted: no_such_package.part is not installed."
    assert isinstance(failing, str)
    assert failing.startswith("failing: no such operator")
    assert "\n" not in failing
    assert isinstance(unreadable, str)
    assert unreadable.startswith("broken, ONNX Runtime, dense, fp32: ")
    assert quantised == "ONNX Runtime, dense, int8: it starts from what torch.onnx.export writes."


def test_a_compiler_that_fails_at_a_larger_batch(
    plain: Bundle, quick, exporters, monkeypatch, tmp_path: Path
):
    """It is seen before the timing, which it would end."""
    exporters({})

    class Compiled(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> object:
            if len(images) > 1:
                raise RuntimeError("no register is left")
            return self.model(images)

    monkeypatch.setattr(torch, "compile", Compiled)
    compiled = found(plain, tmp_path)[2]
    assert compiled == "torch.compile, dense, fp32: no register is left"


def test_a_quantiser_that_fails(plain: Bundle, quick, monkeypatch, tmp_path: Path):
    def export_by_torch(vit: object, spec: object, file: Path) -> None:
        file.write_bytes(b"no graph")

    name = "torch.onnx.export"
    monkeypatch.setattr(module, "EXPORTERS", {name: ((), export_by_torch)})
    monkeypatch.setattr(module, "QUANTISERS", {"int8": quantise_dynamic})
    *_, line = found(plain, tmp_path)
    assert isinstance(line, str)
    assert line.startswith("ONNX Runtime, dense, int8: ")


def test_others_keep_to_themselves(plain: Bundle, quick, exporters, tmp_path: Path, capfd):
    """What they print, warn of and log; and no handler of theirs stays behind."""

    def export(vit: object, spec: object, file: Path) -> None:
        print("50 %")
        print("50 %", file=sys.stderr)
        warnings.warn("deprecated", stacklevel=1)
        logging.root.addHandler(logging.StreamHandler(sys.stderr))
        logging.warning("an axis is out of range")
        raise RuntimeError("no")

    exporters({"loud": export})
    handlers = list(logging.root.handlers)
    *_, line = found(plain, tmp_path)
    assert line == "loud: no"
    assert logging.root.handlers == handlers
    assert capfd.readouterr() == ("", "")


def test_without_torch(plain: Bundle, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(module, "is_installed", lambda *packages: "torch" not in packages)
    (line,) = found(plain, tmp_path)
    assert line == "torch and timm are not installed: there is nothing to compare with."


@pytest.mark.parametrize("threads", [None, 1])
def test_how_memory_is_asked_for(
    plain: Bundle, quick, exporters, threads: int | None, tmp_path: Path
):
    exporters({})
    images = sample_images(plain.spec, 1)
    for peer in open_peers(plain, "cpu", threads, tmp_path, lambda _: None, images=images):
        assert isinstance(peer, Peer)
        assert peer.memory(6) == 1
    more = () if threads is None else (threads,)
    kinds = (("eager", "r00"), ("compiled", "r00"), ("scatter", "r08"))
    image = ",".join(map(str, (plain.spec.channels, *plain.spec.image_size)))
    assert quick == [
        (
            "tocom_export.training.peers",
            (plain.path, kind, precision, variant, "cpu", f"6,{image}", *more),
        )
        for kind, variant in kinds
        for precision in ("fp32", "bf16")
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it")
def test_a_process_that_runs_one(plain: Bundle):
    image = ",".join(map(str, (2, plain.spec.channels, *plain.spec.image_size)))
    line = [
        sys.executable,
        "-m",
        "tocom_export.training.peers",
        str(plain.path),
        "scatter",
        "bf16",
        "r08",
        "cpu",
        image,
        "1",
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100_000_000  # PyTorch is in it


def test_threads_of_onnx_runtime(plain: Bundle, monkeypatch):
    import onnxruntime

    opened = []
    session = onnxruntime.InferenceSession

    def spy(file: str, options: onnxruntime.SessionOptions, **more: object) -> object:
        opened.append((options.intra_op_num_threads, more["providers"]))
        return session(file, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    graph = plain.graph("r00")  # any with one input
    runs = [open_run(graph, "onnx", "fp32", "r00", "cpu", threads) for threads in (None, 2)]
    assert opened == [(0, ["CPUExecutionProvider"]), (2, ["CPUExecutionProvider"])]
    for run in runs:
        same(run, plain, "r00")

"""``build`` for TensorRT, as far as it goes without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from tocom_export.bundle.opening import Bundle
from tocom_export.engines import verify
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.verify import compare

Run = Callable[..., Result]
Options = tuple[object, ...]


@pytest.mark.parametrize(
    "options, says",
    [
        (("--batch", "8,4,1"), ("--batch", "1 ≤ MIN ≤ OPT ≤ MAX")),
        (("--batch", "1,2"), ("--batch", "'1,2' is not MIN,OPT,MAX")),
        (("--batch", "0"), ("--batch", "1 ≤ MIN")),
        (("--batch", "1,2,2147483648"), ("--batch", "2147483648", "MAX < 2³¹")),
        (("--batch", "100000000000000000000"), ("--batch", "MAX < 2³¹")),
        (("--strip", "--refit", "none"), ("--strip", "--refit none")),
        (("--backend", "tensorrt-rtx"), ("--backend tensorrt and --backend tensorrt-rtx",)),
    ],
    ids=str,
)
def test_options_that_don_t_fit(fails: Run, model: Options, options: Options, says):
    fails("build", *model, "--backend", "tensorrt", *options, says=says)


def test_a_dry_run_names_the_plans(succeeds: Run, model: Options, here: Path):
    result = succeeds("build", *model, "--targets", "4,8", "--backend", "tensorrt", "--dry-run")
    assert all(name in result.stdout for name in ("r04.plan", "r08.plan", "r08.plan.json"))
    assert (
        "trtexec --onnx=tiny-source4/r08.onnx --saveEngine=tiny-source4/r08.plan "
        "--minShapes=images:1x3x32x32 --optShapes=images:8x3x32x32 --maxShapes=images:32x3x32x32"
    ) in result.stdout
    assert not list(here.iterdir())


def test_a_dry_run_has_trtexec_s_flags(succeeds: Run, model: Options):
    options = (*model, "--targets", 8, "--backend", "tensorrt", "--dry-run", "--json")
    (plain,) = json.loads(succeeds("build", *options).stdout)["trtexec"]
    flags = {
        "--version-compatible": "--versionCompatible",
        "--hardware-compatible": "--hardwareCompatibilityLevel=ampere+",
    }
    for option, flag in flags.items():
        (line,) = json.loads(succeeds("build", *options, option).stdout)["trtexec"]
        assert {*line.split()} - {*plain.split()} == {flag}


@pytest.mark.parametrize(
    "options, says",
    [
        (("--backend", "tensorrt-rtx"), "neither builds nor runs plans of TensorRT-RTX"),
        (("--backend", "tensorrt", "--strip"), "its --stripWeights implies REFIT_IDENTICAL"),
    ],
)
def test_a_dry_run_without_a_line_of_trtexec(succeeds: Run, model: Options, options, says: str):
    result = succeeds("build", *model, "--targets", 8, *options, "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert document["trtexec"] == []
    assert "r08.plan" in document["files"]
    assert says in result.stderr
    assert "trtexec" not in succeeds("build", *model, *options, "--dry-run").stdout


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_version_compatible_plans_are_tensorrt_s_alone(
    fails: Run, model: Options, here: Path, dry: Options
):
    options = ("--backend", "tensorrt-rtx", "--version-compatible", *dry)
    fails("build", *model, *options, says=("--version-compatible is TensorRT's alone",))
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "option",
    [
        ("--batch", "1,8,32"), ("--refit", "qkv"), ("--strip",), ("--version-compatible",),
        ("--hardware-compatible",),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_plans_without_plans(fails: Run, model: Options, here: Path, option: Options):
    """Given, even as they are by default."""
    fails("build", *model, *option, says=(f"{option[0]} is for plans", "--backend tensorrt"))
    assert not list(here.iterdir())


def builds(nvidia: Any) -> int:
    return sum(entry[0] == "build" for entry in nvidia.trt.asked)


@pytest.fixture
def agrees(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pretended plans give what they are compared with, but for the next ``wrong`` checks."""
    state = SimpleNamespace(wrong=0)

    def pretend(run: Any, images: Any, oracle: Any, engine: str, *rest: Any, **options: Any) -> Any:
        if engine.endswith(".plan"):
            state.wrong -= 1
            run = run if state.wrong >= 0 or oracle is None else oracle
        return compare(run, images, oracle, engine, *rest, **options)

    monkeypatch.setattr(verify, "compare", pretend)
    return state


class TestGpu:
    """A pretended GPU, whose plans give logits of their own."""

    @pytest.fixture(autouse=True)
    def _folder(self, nvidia: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOCOM_EXPORT_CACHE", str(tmp_path / "cache"))

    @pytest.fixture
    def options(self, model: Options) -> Options:
        return (*model[:-1], "--targets", 8, "--backend", "tensorrt")

    @pytest.fixture
    def without(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Plans are built where some packages are not installed."""

        def call(*missing: str) -> None:
            for module in ("exporting", "export_checks"):
                monkeypatch.setattr(
                    f"tocom_export.{module}.is_installed",
                    lambda *names: not {*names} & {*missing},
                )

        return call

    def test_a_plan_is_run_against_pytorch(self, succeeds: Run, fails: Run, options, agrees):
        assert "and agree with the PyTorch model" in succeeds("build", *options).stderr
        agrees.wrong = 1
        says = ("r08.plan differs from the PyTorch model", "no bundle was written")
        fails("build", *options, "--out", "b", "--refit", "none", says=says, status=1)
        assert not Path("b").exists()

    def test_without_torch_against_onnxruntime(
        self, nvidia, succeeds: Run, fails: Run, options, agrees, without
    ):
        without("torch")
        result = succeeds("build", *options)
        assert "and agree with ONNX Runtime on the same graph" in result.stderr
        again = succeeds("build", *options, "--out", "again", "-v")
        assert "refitted from an earlier build's" in again.stderr
        assert builds(nvidia) == 1
        agrees.wrong = 1
        says = ("r08.plan differs from ONNX Runtime on the same graph",)
        fails("build", *options, "--out", "b", "--refit", "none", says=says, status=1)

    @pytest.mark.parametrize("strip", [(), ("--strip",)])
    def test_with_nothing_to_compare_it_with(
        self, nvidia, succeeds: Run, fails: Run, options, without, monkeypatch, strip
    ):
        without("torch", "onnxruntime")
        result = succeeds("build", *options, *strip)
        assert "were run, and what they give is finite" in result.stderr
        succeeds("build", *options, *strip, "--out", "again")
        assert builds(nvidia) == 1
        nan = np.full((20, 10), np.nan, np.float32)
        monkeypatch.setattr(TensorRtEngine, "run_all", lambda *_: {"logits": nan})
        says = ("r08.plan gives logits that are NaN or Inf",)
        fails("build", *options, *strip, "--out", "b", says=says, status=1)

    def test_a_kept_plan_that_fails_its_check_is_built_afresh(
        self, nvidia, succeeds: Run, options, agrees
    ):
        succeeds("build", *options)
        agrees.wrong = 1
        result = succeeds("build", *options, "--out", "again", "-v")
        assert "r08.plan: refitted, it fails its check; it is built afresh" in result.stderr
        assert builds(nvidia) == 2

    def test_a_plan_that_was_not_run(self, nvidia, succeeds: Run, options):
        result = succeeds("build", *options, "--no-verify")
        assert "not run: verify is off" in result.stderr
        succeeds("build", *options, "--no-verify", "--out", "again")
        assert builds(nvidia) == 2  # what nobody looked at is not kept

    def test_plans_are_counted(self, nvidia, succeeds: Run, options):
        result = succeeds("build", *options, "--no-verify", "--json", "--out", "out")
        bundle = Bundle.open(Path("out"))
        names = {*bundle.files, "r08.plan"}
        total = sum((bundle.path / name).stat().st_size for name in names)
        assert json.loads(result.stdout)["bytes"] == total == bundle.size()
        assert f"Wrote out: {total / 1e6:.1f} MB" in result.stderr

    def test_what_is_missing_is_said_before_the_work(
        self, nvidia, fails: Run, options, photos: Path, here: Path, monkeypatch
    ):
        def work(*_: Any) -> None:
            raise AssertionError("it has begun")

        monkeypatch.setattr("tocom_export.exporting._calibrate", work)
        options = (*options, "--precision", "int8", "--calibrate", photos)
        nvidia.cuda.gpus = 0
        fails("build", *options, says=("--backend tensorrt", "no GPU that CUDA can use"))
        nvidia.cuda.gpus = 1
        with monkeypatch.context() as patched:
            patched.delattr(nvidia.trt.BuilderFlag, "REFIT_INDIVIDUAL")
            fails("build", *options, says=("--refit qkv", "10.2"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        fails("build", *options, says=("cuda-python is not installed",))
        assert not list(here.iterdir())


class TestRtx:
    """NVIDIA's own library, which builds plans that can't be refitted without a GPU."""

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
        runtime = pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
        if not int(runtime.cudaGetDeviceCount()[0]):
            pytest.skip("there is a GPU")

    def test_plans_for_other_machines(self, succeeds: Run, fails: Run, model: Options):
        options = (*model, "--targets", "4,8", "--backend", "tensorrt-rtx", "--refit", "none")
        result = succeeds("build", *options, "--precision", "fp16", "--out", "out")
        assert "not run: there is no GPU" in result.stderr
        bundle = Bundle.open(Path("out"))
        assert bundle.plans == ("r04", "r08")
        record = json.loads(Path("out/r08.plan.json").read_text())
        assert (record["backend"], record["precision"]) == ("tensorrt-rtx", "fp16")
        assert (record["gpu"], record["refittable"]) == (None, {})
        assert Path("out/r08.plan").stat().st_size > 50_000
        succeeds("inspect", "out")
        succeeds("inspect", "out/r08.plan")
        succeeds("build", *options, "--out", "out", "--force")
        fails("refit", "out/r08.plan", "--bank", "none", says=("--refit none", "--refit qkv"))

    def test_a_refittable_plan_needs_a_gpu(self, fails: Run, model: Options, here: Path):
        options = (*model, "--backend", "tensorrt-rtx")
        fails("build", *options, says=("no GPU that CUDA can use", "--refit none"))
        assert not [p for p in here.iterdir() if p.is_dir()]

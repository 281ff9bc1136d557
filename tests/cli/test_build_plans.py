"""``build`` for TensorRT, as far as it goes without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tocom_export.bundle import Bundle

Run = Callable[..., Result]
Options = tuple[object, ...]


@pytest.mark.parametrize(
    "options, says",
    [
        (("--batch", "8,4,1"), ("--batch", "1 ≤ MIN ≤ OPT ≤ MAX")),
        (("--batch", "1,2"), ("--batch", "'1,2' is not MIN,OPT,MAX")),
        (("--batch", "0"), ("--batch", "1 ≤ MIN")),
        (("--strip", "--refit", "none"), ("--strip", "--refit none")),
        (("--engine", "tensorrt-rtx"), ("--engine tensorrt and --engine tensorrt-rtx",)),
    ],
    ids=str,
)
def test_options_that_don_t_fit(fails: Run, model: Options, options: Options, says):
    fails("build", *model, "--engine", "tensorrt", *options, says=says)


def test_a_dry_run_names_the_plans(succeeds: Run, model: Options, here: Path):
    result = succeeds("build", *model, "--targets", "4,8", "--engine", "tensorrt", "--dry-run")
    assert all(name in result.stdout for name in ("r04.plan", "r08.plan", "r08.plan.json"))
    assert (
        "trtexec --onnx=tiny-source4/r08.onnx --saveEngine=tiny-source4/r08.plan "
        "--minShapes=images:1x3x32x32 --optShapes=images:8x3x32x32 --maxShapes=images:32x3x32x32"
    ) in result.stdout
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
        options = (*model, "--targets", "4,8", "--engine", "tensorrt-rtx", "--refit", "none")
        result = succeeds("build", *options, "--precision", "fp16", "--out", "out")
        assert "not run: there is no GPU" in result.stderr
        bundle = Bundle.open(Path("out"))
        assert bundle.plans == (4, 8)
        record = json.loads(Path("out/r08.plan.json").read_text())
        assert (record["library"], record["precision"]) == ("tensorrt-rtx", "fp16")
        assert (record["gpu"], record["refittable"]) == (None, {})
        assert Path("out/r08.plan").stat().st_size > 50_000
        succeeds("inspect", "out")
        succeeds("inspect", "out/r08.plan")
        succeeds("build", *options, "--out", "out", "--force")
        fails("refit", "out/r08.plan", "--bank", "none", says=("--refit none", "--refit qkv"))

    def test_a_refittable_plan_needs_a_gpu(self, fails: Run, model: Options, here: Path):
        options = (*model, "--engine", "tensorrt-rtx")
        fails("build", *options, says=("no GPU that CUDA can use", "--refit none"))
        assert not [p for p in here.iterdir() if p.is_dir()]

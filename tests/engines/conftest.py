"""Bundles that the engine tests run; those that change one copy it first."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tocom_export.build import BuildPlan, write_bundle
from tocom_export.bundle import Bundle


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small are slower on several threads, by far on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plan(
    tmp_path_factory: pytest.TempPathFactory, make_plan: Callable[..., BuildPlan]
) -> BuildPlan:
    return make_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, plan: BuildPlan) -> Bundle:
    """Targets 0, 8 and 16 of a small compensated model; not to be written to."""
    return write_bundle(plan, tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture
def fresh(tmp_path: Path, plan: BuildPlan) -> Bundle:
    """The same bundle, a test's own to damage."""
    return write_bundle(plan, tmp_path / "fresh")


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pretended TensorRT (``trt``) and CUDA (``cuda``), imported in place of the real ones."""
    place = Path(__file__).with_name("stand_in.py")
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

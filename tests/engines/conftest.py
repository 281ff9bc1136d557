"""Bundles that the engine tests run; those that change one copy it first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import BuildPlan, write_bundle


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

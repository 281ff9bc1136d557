"""What the tests of a pool ask it, and what they hold its answers against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tocom_export import EnginePool
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.serving.loaded import Serving

Answers = dict[str, Any]


@pytest.fixture
def images(fresh: Bundle, make_images: Callable[..., Any]) -> Any:
    return make_images(fresh.spec, 3)


@pytest.fixture(scope="session")
def answers() -> Callable[[Bundle, Any], Answers]:
    """Variant → what its own engine says."""

    def ask(bundle: Bundle, images: Any) -> Answers:
        return {name: OnnxEngine(bundle, name, threads=1).run(images) for name in bundle.variants}

    return ask


@pytest.fixture(scope="session")
def of_pool() -> Callable[[EnginePool, Any], Answers]:
    """Variant → what a pool says that serves it."""

    def ask(pool: EnginePool, images: Any) -> Answers:
        found = {}
        for name in pool.variants:
            pool.switch(name)
            found[name] = pool.run(images)
        return found

    return ask


@pytest.fixture(scope="session")
def same() -> Callable[[Answers, Answers], bool]:
    return lambda found, wanted: all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="session")
def origin() -> Callable[[Serving], tuple[int, float]]:
    """Source and scale of what serves."""
    return lambda serving: (serving.variant.source, serving.variant.scale)


@pytest.fixture
def other_checkpoint(make_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Other weights of a blueprint's model, in a folder of their own."""

    def make(folder: Path, blueprint: Blueprint, seed: int = 5) -> Path:
        (folder / "other").mkdir()
        return make_checkpoint(folder / "other", blueprint.weights.spec, seed)

    return make

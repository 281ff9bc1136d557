"""Bundles that the engine tests run; those that change one copy it first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tocom_export.bundle.manifest import plan_name
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.library import Library, open_library
from tocom_export.engines.tensorrt.plan import save_plan

FAST = (20, 3, 0, 7)
"""30, 27, 27 and 20 tokens: what degrees 16, 16, 11.5 and 7⅔ would bring to each layer."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small are slower on several threads, by far on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def blueprint(
    tmp_path_factory: pytest.TempPathFactory, make_blueprint: Callable[..., Blueprint]
) -> Blueprint:
    return make_blueprint(tmp_path_factory.mktemp("blueprint"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, blueprint: Blueprint) -> Bundle:
    """r00, r08 and r16 of a small compensated model; not to be written to."""
    return write_bundle(blueprint, tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture
def fresh(tmp_path: Path, blueprint: Blueprint) -> Bundle:
    """The same bundle, a test's own to damage."""
    return write_bundle(blueprint, tmp_path / "fresh")


@pytest.fixture(scope="session", params=[0, 16], ids="source {}".format)
def mixed_blueprint(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_blueprint: Callable[..., Blueprint],
) -> Blueprint:
    folder = tmp_path_factory.mktemp("mixed")
    return make_blueprint(
        folder, source=request.param, targets=(0, 8, 16), schedules={"fast": FAST}
    )


@pytest.fixture
def mixed(tmp_path: Path, mixed_blueprint: Blueprint) -> Bundle:
    """r00, r08, r16, and ``fast``, whose degree is another in each layer; a test's own."""
    return write_bundle(mixed_blueprint, tmp_path / "mixed")


@pytest.fixture(scope="session")
def revise() -> Callable[..., Blueprint]:
    """A blueprint with other values of its own, its weights, or (source, scale) its variants."""

    def call(blueprint: Blueprint, **changes: Any) -> Blueprint:
        def take(*names: str) -> dict[str, Any]:
            return {name: changes.pop(name) for name in names if name in changes}

        of_variants = take("source", "scale")
        of_weights = take("spec", "checkpoint", "bank", "precision")
        if "bank" in of_weights:
            of_variants["compensated"] = of_weights["bank"] is not None
        variants = {
            name: dataclasses.replace(variant, **of_variants)
            for name, variant in blueprint.variants.items()
        }
        weights = dataclasses.replace(blueprint.weights, **of_weights)
        return dataclasses.replace(
            blueprint, **{"weights": weights, "variants": variants, **changes}
        )

    return call


@pytest.fixture(scope="session")
def write_plan() -> Callable[..., Path]:
    """Build a plan and write it into its bundle's folder; the manifest stays as it was."""

    def call(
        bundle: Bundle, variant: str = "r08", library: Library = "tensorrt", **options: Any
    ) -> Path:
        plan = bundle.path / plan_name(variant)
        built = build_plan(
            open_library(library), bundle, bundle.variant(variant), PlanOptions(**options)
        )
        save_plan(plan, *built)
        return plan

    return call

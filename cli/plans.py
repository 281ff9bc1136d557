"""What ``build`` does for TensorRT: its options, and plans added to a bundle."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tocom_export.cli.common import Output
from tocom_export.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from tocom_export.build import BuildPlan
    from tocom_export.bundle import Bundle
    from tocom_export.engines.nvidia import Library, Nvidia
    from tocom_export.engines.plan import PlanRecord, Refit
    from tocom_export.engines.plan_build import PlanOptions

F = TypeVar("F", bound=Callable[..., Any])
Judge = Callable[[int, Any], Any]
"""Target and images → the logits that an engine should give."""


class Batches(click.ParamType[tuple[int, int, int]]):
    """Smallest, optimal and largest batch: ``1,8,32``; or one for all three."""

    name = "MIN,OPT,MAX"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [int(part) for part in value.split(",")]
            smallest, optimal, largest = numbers * 3 if len(numbers) == 1 else numbers
        except ValueError:
            self.fail(f"{value!r} is not MIN,OPT,MAX, such as 1,8,32.", param, ctx)
        if not 1 <= smallest <= optimal <= largest:
            self.fail(f"{value!r}: 1 ≤ MIN ≤ OPT ≤ MAX is needed.", param, ctx)
        return smallest, optimal, largest


def plan_options(function: F) -> F:
    """The options of plans."""
    for option in reversed(
        (
            click.option(
                "--batch",
                type=Batches(),
                default="1,8,32",
                show_default=True,
                help="Batches that a TensorRT plan takes, and the one it is made for.",
            ),
            click.option(
                "--refit",
                type=click.Choice(["qkv", "all", "none"]),
                default="qkv",
                show_default=True,
                help="Weights that a plan lets go of: what ToCom changes, every one, or none.",
            ),
            click.option(
                "--strip",
                is_flag=True,
                help="Leave those weights out of the plan; it is refitted before it runs.",
            ),
            click.option(
                "--version-compatible",
                is_flag=True,
                help="Plans that later versions of TensorRT run, too.",
            ),
            click.option(
                "--hardware-compatible",
                is_flag=True,
                help="Plans for any GPU since Ampere, which may be slower on each.",
            ),
        )
    ):
        function = option(function)
    return function


def library_of(engines: tuple[str, ...], refit: Refit, strip: bool) -> Library | None:
    """The library that ``--engine`` asks for; None for ONNX alone.

    Raises:
        InputError: both are asked for, or options that contradict each other.
    """
    libraries: list[Any] = [engine for engine in dict.fromkeys(engines) if engine != "onnx"]
    if len(libraries) > 1:
        raise InputError(
            "--engine tensorrt and --engine tensorrt-rtx write files of the same names; build a "
            "bundle for each."
        )
    if strip and refit == "none":
        raise InputError(
            "--strip leaves out what a refit puts in; --refit none has no such weights."
        )
    return libraries[0] if libraries else None


def add_plans(
    bundle: Bundle, library: Library, options: PlanOptions, verify: bool, output: Output
) -> Bundle:
    """Build a plan for each target of a bundle that is being put together.

    On a machine with a GPU each plan is run against PyTorch before the build is called done:
    TensorRT may drop a bias of a refittable plan.

    Raises:
        CheckFailed: a plan says something else than the model.
        PlanError: the library can't build it.
    """
    from tocom_export.bundle import plan_name
    from tocom_export.engines.cuda import find_gpu
    from tocom_export.engines.nvidia import open_library
    from tocom_export.engines.plan import save_plan
    from tocom_export.engines.plan_cache import keep_plan, kept_plan, place

    nvidia = open_library(library, output.detail)
    reference: Judge | None = None
    for target in bundle.targets:
        plan = bundle.path / plan_name(target)
        earlier = place(nvidia, bundle, target, options)
        kept = kept_plan(earlier, bundle, target) if earlier else None
        content, record = kept or _built(nvidia, bundle, target, options, output)
        save_plan(plan, content, record)
        how = "refitted from an earlier build's" if kept else "built"
        output.detail(f"{plan.name}: {how}, {len(content)} bytes, {library} {record.version}")
        if verify and record.gpu:
            reference = reference or _reference(bundle)
            _check(bundle, target, plan, reference)
            if earlier and not kept:
                keep_plan(earlier, content, record)
    if not find_gpu():
        output.note("The plans were not run: there is no GPU here.")
    return dataclasses.replace(bundle, plans=tuple(bundle.targets))


def _built(
    nvidia: Nvidia, bundle: Bundle, target: int, options: PlanOptions, output: Output
) -> tuple[bytes, PlanRecord]:
    from tocom_export.engines.plan_build import build_plan

    with output.progress(f"building r{target:02d}.plan", 100) as advance:
        done = 0

        def tell(phase: str, step: int, steps: int) -> None:
            nonlocal done
            while done < 100 * step // steps:
                done += 1
                advance(phase)

        return build_plan(nvidia, bundle, target, options, tell)


def trtexec_lines(plan: BuildPlan, out: Path, batch: tuple[int, int, int]) -> list[str]:
    """What would build the plans with NVIDIA's tool, for the version on the PATH, else for 10."""
    from tocom_export.bundle import graph_name, plan_name
    from tocom_export.engines import trtexec

    program = trtexec.find()
    major = program[1] if program else 10
    return [
        shlex.join(
            trtexec.build_line(out / graph_name(t), out / plan_name(t), plan.spec, batch, major)
        )
        for t in plan.targets
    ]


def _reference(bundle: Bundle) -> Judge:
    from tocom_export.training.reference import Reference

    return Reference(bundle)


def _check(bundle: Bundle, target: int, plan: Path, reference: Judge) -> None:
    from tocom_export.engines.compare import compare_engine, sample_images
    from tocom_export.engines.tensorrt import TensorRtEngine

    engine = TensorRtEngine(plan, host_code=True)  # of our own building
    if engine.record.stripped:
        tensors = bundle.tensors(target)
        engine.refit({name: tensors[name] for name in engine.record.refittable})
    images = sample_images(bundle.spec)
    batch = engine.record.batch[2]
    found = compare_engine(
        engine.run, target, bundle.precision, images, partial(reference, target), batch=batch
    )
    if not found.passed:
        raise CheckFailed(
            f"{plan.name} differs from the PyTorch model {found.difference}; no bundle was "
            "written. Try --refit none, and please report this."
        )

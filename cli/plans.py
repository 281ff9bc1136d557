"""What ``build`` does for TensorRT: its options, and plans added to a bundle."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from tocom_export.errors import CheckFailed, InputError

from .output import Output, installed

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.bundle.writing import BuildPlan
    from tocom_export.engines.tensorrt.building import PlanOptions
    from tocom_export.engines.tensorrt.library import Library, Nvidia
    from tocom_export.engines.tensorrt.plan import PlanRecord, Refit

F = TypeVar("F", bound=Callable[..., Any])
PLAN_OPTIONS = ("batch", "refit", "strip", "version_compatible", "hardware_compatible")
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
        if not 1 <= smallest <= optimal <= largest < 2**31:  # an int32 in the library
            self.fail(f"{value!r}: 1 ≤ MIN ≤ OPT ≤ MAX < 2³¹ is needed.", param, ctx)
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
        InputError: both are asked for, or options that contradict each other or want a library.
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
    if not libraries:
        context = click.get_current_context()
        for name in PLAN_OPTIONS:
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise InputError(
                    f"--{name.replace('_', '-')} is for plans; add --engine tensorrt or "
                    "tensorrt-rtx, or leave it out."
                )
    return libraries[0] if libraries else None


def add_plans(
    bundle: Bundle, library: Library, options: PlanOptions, verify: bool, output: Output
) -> Bundle:
    """Build a plan for each target of a bundle that is being put together.

    On a machine with a GPU each plan is run before the build is called done, against the model
    where something can run that: TensorRT may drop a bias of a refittable plan.

    Raises:
        CheckFailed: a plan says something else than the model.
        PlanError: the library can't build it.
    """
    from tocom_export.bundle.opening import plan_name
    from tocom_export.engines.tensorrt.building import check_can_build
    from tocom_export.engines.tensorrt.cache import keep_plan, kept_plan, place
    from tocom_export.engines.tensorrt.library import open_library
    from tocom_export.engines.tensorrt.plan import save_plan

    nvidia = open_library(library, output.detail)
    gpu = check_can_build(nvidia, options)
    check = verify and gpu is not None
    who, judge = _judge(bundle) if check else ("", None)
    for target in bundle.targets:
        plan = bundle.path / plan_name(target)

        def put(content: bytes, record: PlanRecord, how: str, plan: Path = plan) -> None:
            save_plan(plan, content, record)
            output.detail(f"{plan.name}: {how}, {len(content)} bytes, {library} {record.version}")

        earlier = place(nvidia, bundle, target, options)
        if earlier and (kept := kept_plan(earlier, bundle, target)):
            put(*kept, "refitted from an earlier build's")
            try:
                if check:
                    _check(bundle, target, who, judge)
                continue
            except CheckFailed:
                output.detail(f"{plan.name}: refitted, it fails its check; it is built afresh")
        built = _built(nvidia, bundle, target, options, output)
        put(*built, "built")
        if check:
            _check(bundle, target, who, judge)
            if earlier:
                keep_plan(earlier, *built)
    if check and judge:
        output.note(f"The plans were run, and agree with {who}.")
    elif check:
        output.note(
            "The plans were run, and give numbers; with neither torch and timm nor onnxruntime "
            "installed, there was nothing to compare them with."
        )
    else:
        why = "--no-verify" if gpu else "there is no GPU here"
        output.note(f"The plans were not run: {why}.")
    return dataclasses.replace(bundle, plans=tuple(bundle.targets))


def _built(
    nvidia: Nvidia, bundle: Bundle, target: int, options: PlanOptions, output: Output
) -> tuple[bytes, PlanRecord]:
    from tocom_export.engines.tensorrt.building import build_plan

    with output.progress(f"building r{target:02d}.plan", 100) as advance:
        done = 0

        def tell(phase: str, step: int, steps: int) -> None:
            nonlocal done
            while done < 100 * step // steps:
                done += 1
                advance(phase)

        return build_plan(nvidia, bundle, target, options, tell)


def no_trtexec(library: Library, options: PlanOptions) -> str:
    """Why NVIDIA's tool can't build such plans; empty where it can."""
    if library == "tensorrt-rtx":
        return "No lines for trtexec, which neither builds nor runs plans of TensorRT-RTX."
    if options.strip:
        return (
            "No lines for trtexec: its --stripWeights implies REFIT_IDENTICAL, so that such plans "
            "take no other weights than their own."
        )
    return ""


def trtexec_lines(plan: BuildPlan, out: Path, options: PlanOptions) -> list[str]:
    """What would build the plans with NVIDIA's tool, for the version on the PATH, else for 10."""
    from tocom_export.bundle.opening import graph_name, plan_name
    from tocom_export.engines.tensorrt import trtexec

    program = trtexec.find()
    major = program[1] if program else 10
    return [
        shlex.join(
            trtexec.build_line(
                out / graph_name(t),
                out / plan_name(t),
                plan.spec,
                options.batch,
                major,
                version_compatible=options.version_compatible,
                hardware_compatible=options.hardware_compatible,
            )
        )
        for t in plan.targets
    ]


def _judge(bundle: Bundle) -> tuple[str, Judge | None]:
    """What plans are compared with, the model or the same graphs elsewhere; its name first."""
    if installed("torch", "timm"):
        from tocom_export.training.torch_engine import Reference

        return "the PyTorch model", Reference(bundle)
    if installed("onnxruntime"):
        from tocom_export.engines.onnx.engine import OnnxEngine

        return "ONNX Runtime on the same graph", lambda t, images: OnnxEngine(bundle, t).run(images)
    return "", None


def _check(bundle: Bundle, target: int, who: str, judge: Judge | None) -> None:
    from tocom_export.engines.tensorrt.checking import compare_plan
    from tocom_export.engines.verify import sample_images

    reference = partial(judge, target) if judge else None
    images = sample_images(bundle.spec)
    found = compare_plan(bundle, target, images, reference, host_code=True)  # of our own building
    if not found.passed:
        what = "gives logits that are no numbers"
        if found.finite:
            what = f"differs from {who} {found.difference}"
        raise CheckFailed(
            f"r{target:02d}.plan {what}; no bundle was written. Try --refit none, and please "
            "report this."
        )

"""The options of TensorRT plans."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from .options import add_options

if TYPE_CHECKING:
    from tocom_export.bundle.writing import Blueprint
    from tocom_export.engines.tensorrt.building import PlanOptions
    from tocom_export.engines.tensorrt.library import Library

PLAN_PARAMETERS = ("batch", "refit", "strip", "version_compatible", "hardware_compatible")


class PlanBatch(click.ParamType[tuple[int, int, int]]):
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


plan_options = add_options(
    click.option(
        "--batch",
        type=PlanBatch(),
        default="1,8,32",
        help="Batches that a TensorRT plan takes, and the one it is made for.",
    ),
    click.option(
        "--refit",
        type=click.Choice(["qkv", "all", "none", "identical"]),
        default="qkv",
        help="Weights that a plan lets go of: what ToCom changes, every one, or none; identical: a "
        "plan without weights, which takes the bundle's, and no others, when it is opened.",
    ),
    click.option(
        "--strip",
        is_flag=True,
        help="Leave those weights out of the plan; it is refitted before it runs.",
    ),
    click.option(
        "--version-compatible", is_flag=True, help="Plans that later versions of TensorRT run, too."
    ),
    click.option(
        "--hardware-compatible",
        is_flag=True,
        help="Plans for any GPU since Ampere, which may be slower on each.",
    ),
)


def take_plan_options(
    backends: tuple[str, ...], typed: Mapping[str, str], options: dict[str, Any]
) -> tuple[Library, PlanOptions] | None:
    """The library that builds plans, and how; None for ONNX alone. Taken out of ``options``.

    Args:
        typed: the plan options that were given: parameter → option.

    Raises:
        InputError: both libraries are asked for, or options that contradict each other or want one.
    """
    values = {name: options.pop(name) for name in PLAN_PARAMETERS}
    libraries: list[Any] = [name for name in dict.fromkeys(backends) if "tensorrt" in name]
    if len(libraries) > 1:
        raise InputError(
            "--backend tensorrt and --backend tensorrt-rtx write files of the same names; build a "
            "bundle for each."
        )
    if values["strip"] and values["refit"] == "none":
        raise InputError(
            "--strip leaves out what a refit puts in; --refit none has no such weights."
        )
    if not libraries:
        for option in typed.values():
            raise InputError(
                f"{option} is for plans; add --backend tensorrt or tensorrt-rtx, or leave it out."
            )
        return None
    from tocom_export.engines.tensorrt.building import PlanOptions

    return libraries[0], PlanOptions(**values)


def format_trtexec_lines(
    blueprint: Blueprint, out: Path, library: Library, options: PlanOptions
) -> tuple[list[str], str]:
    """What would build the plans with NVIDIA's tool, or why it can't build such plans."""
    from tocom_export.bundle.manifest import graph_name, plan_name
    from tocom_export.engines.tensorrt import trtexec

    if library == "tensorrt-rtx":
        return [], "No lines for trtexec, which neither builds nor runs plans of TensorRT-RTX."
    identical = options.refit == "identical"
    if options.strip and not identical:
        return [], (
            "No lines for trtexec: its --stripWeights implies REFIT_IDENTICAL, so that such plans "
            "take no other weights than their own."
        )
    program = trtexec.find()
    lines = [
        shlex.join(
            trtexec.build_line(
                out / graph_name(name),
                out / plan_name(name),
                blueprint.weights.spec,
                options.batch,
                program[1] if program else 10,
                version_compatible=options.version_compatible,
                hardware_compatible=options.hardware_compatible,
                identical=identical,
            )
        )
        for name in blueprint.variants
    ]
    return lines, ""

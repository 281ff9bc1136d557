"""``tocom-export build``."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from ..build_options import model_options
from ..build_report import report_build
from ..options import (
    FILE,
    common_options,
    given_options,
    take_output,
    wait_option,
)
from ..output import Command, Output
from ..plan_options import PLAN_PARAMETERS, format_trtexec_lines, plan_options, take_plan_options
from ..runtime_options import BACKENDS

if TYPE_CHECKING:
    from tocom_export.bundle.writing import Blueprint
    from tocom_export.engines.verify import Comparison


@click.command("build", cls=Command)
@model_options
@click.option(
    "--backend",
    "backends",
    type=click.Choice(BACKENDS),
    default=("onnx",),
    multiple=True,
    help="What the graphs are checked in (onnx, openvino) and what plans are built for; "
    "repeatable. Plans lie beside the graphs they are made of.",
)
@click.option(
    "--calibrate",
    type=FILE,
    metavar="DIR|none",
    help="Image files that int8's ranges are measured on; some hundreds (512 at most are taken). "
    "none: they are found at each run, which ONNX Runtime alone is fast at.",
)
@plan_options
@click.option("--out", type=FILE, metavar="DIR", help="Default: ./<model>-source<R>.")
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Run every engine against the PyTorch model; default where torch is installed.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@wait_option
@common_options
def build_command(
    backends: tuple[str, ...],
    calibrate: Path | None,
    out: Path | None,
    verify: bool | None,
    dry_run: bool,
    force: bool,
    wait: bool,
    **options: Any,
) -> None:
    """Write engines for some degrees from a checkpoint and a ToCom bank.

    \b
    Example:
      tocom-export build --source 0 --targets 4,8,12,16
      tocom-export build --schedule fast=20,17,11,6,1,3 --schedule seldom=every:2:12
      tocom-export build --output logits --output embedding --l2-norm
      tocom-export build --model deit_base_patch16_224 \\
          --checkpoint mine.safetensors --bank bank.safetensors
    """
    from tocom_export.engines.bench.quick_look import take_quick_look
    from tocom_export.exporting import check_write, write
    from tocom_export.preparing import default_out, prepare

    output = take_output(options)
    started = time.perf_counter()
    typed = given_options(click.get_current_context(), PLAN_PARAMETERS)
    plans = take_plan_options(backends, typed, options)
    schedules = _name_schedules((*options.pop("schedules"), *sum(options.pop("keeps"), ())))
    notes: list[str] = []  # printed once nothing can be refused any more
    blueprint = prepare(**options, schedules=schedules, tell=notes.append)
    out = out or default_out(blueprint)
    bank, model = blueprint.weights.bank, blueprint.weights.spec.model
    if bank and bank.model not in ("", model):
        output.note(
            f"The bank was trained on {bank.model}; it fits models fine-tuned from that alone."
        )
    if plans:
        timing_cache = out.with_name(f"{out.name}.timing-cache")
        plans = (plans[0], dataclasses.replace(plans[1], timing_cache=timing_cache))
    graphs = tuple(name for name in dict.fromkeys(backends) if name in ("onnx", "openvino"))
    asked: dict[str, Any] = {
        "calibrate": calibrate, "backends": graphs or ("onnx",), "verify": verify,
        "force": force, "plans": plans,
    }  # fmt: skip
    if dry_run:
        check_write(blueprint, out, **asked)
        output.notes(notes)
        _show_files(blueprint, out, plans, output)
        return
    output.detail(f"{options['precision']} of {blueprint.weights.checkpoint.file}")
    checks: dict[str, Comparison] = {}

    def keep_worst(found: Comparison) -> None:
        both = (found, checks.get(found.variant, found))
        checks[found.variant] = max(both, key=lambda check: check.share)

    bundle = write(
        blueprint,
        out,
        **asked,
        wait=wait,
        progress=output.progress,
        tell=output.note,
        detail=output.detail,
        checked=keep_worst,
    )
    output.notes(notes)
    times: dict[str, float] = {}
    with suppress(KeyboardInterrupt):  # the bundle is there: Ctrl-C ends the look at it
        times = take_quick_look(bundle, asked["backends"][0]) if checks else {}
    report_build(bundle, checks, times, time.perf_counter() - started, output)


Named = tuple[str, tuple[int, ...] | str]


def _name_schedules(given: tuple[Named, ...]) -> dict[str, tuple[int, ...] | str]:
    names = [name for name, _ in given]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--schedule {twice[0]} is given twice; choose another name.")
    return dict(given)


def _show_files(blueprint: Blueprint, out: Path, plans: Any, output: Output) -> None:
    """What ``--dry-run`` says."""
    from tocom_export.bundle.manifest import plan_name

    names = [plan_name(name) for name in blueprint.variants] if plans else []
    files = [*blueprint.files(), *names, *(f"{name}.json" for name in names)]
    lines, why = format_trtexec_lines(blueprint, out, *plans) if plans else ([], "")
    degrees = {name: list(variant.degrees) for name, variant in blueprint.variants.items()}
    output.document({"bundle": str(out), "files": files, "degrees": degrees, "trtexec": lines})
    output.table(["would be written"], [[out / name] for name in files], "")
    for name, variant in blueprint.variants.items():
        if variant.degree is None:  # a rule's degrees are seen here first
            output.note(f"{name} would remove {variant.label} tokens, layer by layer.")
    if lines and not output.as_json:
        click.echo("\nThe same graphs by trtexec, which can't mark weights for refit:")
        click.echo("\n".join(lines))
    if why:
        output.note(why)

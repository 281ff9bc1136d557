"""``tocom-export build``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from ..options import (
    DEGREE,
    DEGREES,
    FILE,
    FiniteFloat,
    NamedSchedule,
    add_options,
    common_options,
    format_megabytes,
    given_options,
    method_options,
    take_output,
    wait_option,
)
from ..output import Command, Output
from ..plan_options import PLAN_PARAMETERS, format_trtexec_lines, plan_options, take_plan_options
from ..runtime_options import BACKENDS

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.bundle.writing import Blueprint
    from tocom_export.engines.verify import Comparison
    from tocom_export.variant import Variant

model_options = add_options(
    click.option(
        "--targets",
        type=DEGREES,
        default="0,4,8,12,16",
        help="Degrees to export: 4,8,12,16 or 0-16 or 0,4-16:4.",
    ),
    click.option(
        "--schedule",
        "schedules",
        type=NamedSchedule(),
        multiple=True,
        help="A variant with a degree for each layer (NAME=20,17,11,6,1,3), or a .json file that "
        "lists them; or NAME=every:K, which removes tokens in every K-th layer alone, as many as "
        "make it cost what degree 16 in each does (every:K:R: degree R), and runs faster; "
        "repeatable.",
    ),
    click.option(
        "--source",
        type=DEGREE,
        help="Degree the checkpoint was trained at; default: what its metadata say, else 0.",
    ),
    click.option(
        "--model",
        metavar="NAME",
        help="A timm model name, or 'reference' (the default: "
        "the model that ships inside the package).",
    ),
    click.option(
        "--checkpoint",
        type=FILE,
        metavar="FILE",
        help=".safetensors, .pth or .bin with the model's weights; default: timm's pretrained "
        "weights.",
    ),
    click.option(
        "--bank",
        metavar="FILE",
        help="ToCom bank, ours (.safetensors) or the authors' "
        "layout (.pth); default for 'reference': the shipped one; 'none': no compensation.",
    ),
    click.option(
        "--scale",
        type=FiniteFloat(0),
        default=0.1,
        help="What the bank's steps are multiplied by; the paper uses 0.01 to 0.15.",
    ),
    method_options("the bank's, else the checkpoint's"),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
        default="fp32",
        help="Type of the weights and of the arithmetic; int8 wants --calibrate.",
    ),
)


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
      tocom-export build --model deit_base_patch16_224 \\
          --checkpoint mine.safetensors --bank bank.safetensors
    """
    from tocom_export.exporting import check_write, default_out, prepare, write

    output = take_output(options)
    started = time.perf_counter()
    typed = given_options(click.get_current_context(), PLAN_PARAMETERS)
    plans = take_plan_options(backends, typed, options)
    blueprint = prepare(**{**options, "schedules": _name_schedules(options["schedules"])})
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
        _show_files(blueprint, out, plans, output)
        return
    output.detail(f"{options['precision']} of {blueprint.weights.checkpoint.file}")
    checks: dict[str, Comparison] = {}

    def keep_worst(found: Comparison) -> None:
        both = (found, checks.get(found.variant, found))
        checks[found.variant] = max(both, key=lambda check: check.max_difference or 0)

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
    _report(bundle, checks, time.perf_counter() - started, output)


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


def _report(bundle: Bundle, checks: dict[str, Comparison], seconds: float, output: Output) -> None:
    spec, variants = bundle.spec, bundle.variants.values()
    output.document(
        {
            "bundle": str(bundle.path),
            "model": spec.model,
            "precision": bundle.precision,
            "method": bundle.method.name,
            "bytes": bundle.size(),
            "seconds": round(seconds, 3),
            "variants": [_describe(bundle, v, checks.get(v.name)) for v in variants],
        }
    )
    first = next(iter(variants))
    compensated = any(variant.compensated for variant in variants)
    bank = f"ToCom scale {first.scale}" if compensated else "not compensated"
    heads = ["engine", "degree", "tokens", "MACs", "MACs saved", "max |Δ|", "same top-1"]
    rows = [_make_row(bundle, variant, checks.get(variant.name)) for variant in variants]
    output.table(heads, rows, f"{spec.model}, source {first.source}, {bank}")
    for check in checks.values():
        if check.beyond:
            output.note(
                f"{check.variant}: {check.beyond} of {check.images} images differ by more than "
                "rounding; two pairs of tokens are equally similar there, and either may be merged."
            )
    if checks and all(check.max_difference is None for check in checks.values()):
        output.note(
            "Engines run, logits are finite; without torch there is nothing to compare them with."
        )
    output.note(f"Wrote {bundle.path}: {format_megabytes(bundle.size())} in {seconds:.1f} s.")


def _describe(bundle: Bundle, variant: Variant, check: Comparison | None) -> dict[str, Any]:
    schedule = variant.schedule(bundle.spec)
    return {
        "variant": variant.name,
        "degrees": list(variant.degrees),
        "source": variant.source,
        "scale": variant.scale,
        "compensated": variant.baked,
        "graph": str(bundle.graph(variant.name)),
        "tokens": list(schedule.tokens_out),
        "macs": schedule.macs(bundle.spec),
        "check": check.to_json() if check else None,
    }


def _make_row(bundle: Bundle, variant: Variant, check: Comparison | None) -> list[object]:
    from tocom_export.compression.schedule import Schedule

    spec, schedule = bundle.spec, variant.schedule(bundle.spec)
    macs, dense = schedule.macs(spec), Schedule.of(spec, 0).macs(spec)
    compared = check if check and check.max_difference is not None else None
    return [
        bundle.graph(variant.name).name,
        variant.label,
        f"{spec.tokens} → {schedule.tokens_out[-1]}",
        f"{macs / 1e6:.1f} M",
        f"{100 * (1 - macs / dense):.0f} %",
        f"{compared.max_difference:.1e}" if compared else "-",
        f"{compared.agreement:.0f} %" if compared else "-",
    ]

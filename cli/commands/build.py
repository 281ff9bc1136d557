"""``tocom-export build``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tocom_export.errors import CheckFailed, InputError

from ..output import (
    DEGREE,
    FILE,
    Command,
    Degrees,
    FiniteFloat,
    Output,
    common_options,
    installed,
    megabytes,
    output_of,
)
from ..plans import add_plans, library_of, no_trtexec, plan_options, trtexec_lines

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.bundle.writing import BuildPlan, Calibrate
    from tocom_export.engines.tensorrt.plan import Refit
    from tocom_export.engines.verify import Comparison
    from tocom_export.graph.precision import Precision

CALIBRATION_IMAGES = 512
FEW_IMAGES = 32
"""Fewer say little of how large a layer's inputs get."""


@click.command("build", cls=Command)
@click.option(
    "--source",
    type=DEGREE,
    help="Degree the checkpoint was trained at; default: what its metadata say, else 0.",
)
@click.option(
    "--targets",
    type=Degrees(),
    default="4,8,12,16",
    show_default=True,
    help="Degrees to export: 4,8,12,16 or 0-16 or 0,4-16:4.",
)
@click.option(
    "--model",
    metavar="NAME",
    help="A timm model name, or 'reference' (the default: "
    "the model that ships inside the package).",
)
@click.option(
    "--checkpoint",
    type=FILE,
    metavar="FILE",
    help=".safetensors, .pth or .bin with the model's weights; default: timm's pretrained weights.",
)
@click.option(
    "--bank",
    metavar="FILE",
    help="ToCom bank, ours (.safetensors) or the authors' "
    "layout (.pth); default for 'reference': the shipped one; 'none': no compensation.",
)
@click.option(
    "--scale",
    type=FiniteFloat(0),
    default=0.1,
    show_default=True,
    help="What the bank's steps are multiplied by; the paper uses 0.01 to 0.15.",
)
@click.option(
    "--method", type=click.Choice(["tome", "evit"]), help="Merge or prune; default: the bank's."
)
@click.option(
    "--engine",
    type=click.Choice(["onnx", "tensorrt", "tensorrt-rtx"]),
    default=("onnx",),
    multiple=True,
    show_default=True,
    help="What to write; may be repeated. Plans lie beside the graphs they are made of.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="Type of the weights and of the arithmetic; int8 wants --calibrate.",
)
@click.option(
    "--calibrate",
    type=FILE,
    metavar="DIR",
    help="Image files that int8's ranges are measured on; some hundreds (512 at most are taken).",
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
@common_options
def build_command(
    source: int | None,
    targets: tuple[int, ...],
    model: str | None,
    checkpoint: Path | None,
    bank: str | None,
    scale: float,
    method: str | None,
    engine: tuple[str, ...],
    precision: Precision,
    calibrate: Path | None,
    batch: tuple[int, int, int],
    refit: Refit,
    strip: bool,
    version_compatible: bool,
    hardware_compatible: bool,
    out: Path | None,
    verify: bool | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Write engines for some degrees from a checkpoint and a ToCom bank.

    \b
    Example:
      tocom-export build --source 0 --targets 4,8,12,16
      tocom-export build --model deit_base_patch16_224 \\
          --checkpoint mine.safetensors --bank bank.safetensors
    """
    from tocom_export.bundle.opening import plan_name
    from tocom_export.bundle.writing import check_out, write_bundle

    from ..resolve import plan_build

    output = output_of(as_json, verbose, quiet)
    started = time.perf_counter()
    if verify and not installed("torch", "timm", "onnxruntime"):
        raise InputError(
            "--verify needs torch, timm and onnxruntime: pip install 'tocom-export[cpu,torch]'."
        )
    library = library_of(engine, refit, strip)
    if (precision == "int8") != (calibrate is not None):
        raise InputError(
            "--precision int8 needs --calibrate DIR, a folder of images like those it will see."
            if precision == "int8"
            else f"--calibrate is for --precision int8 alone; this is {precision}."
        )
    plan = plan_build(
        model=model,
        checkpoint_file=checkpoint,
        bank_name=bank,
        method_name=method,
        source=source,
        targets=targets,
        scale=scale,
        precision=precision,
    )
    if plan.bank and plan.bank.model not in ("", plan.spec.model):
        output.note(
            f"The bank was trained on {plan.bank.model}; it fits models fine-tuned from that alone."
        )
    out = out or Path(f"{plan.spec.model}-source{plan.source}")
    check_out(out, force)
    plans = [plan_name(target) for target in targets] if library else []
    options = None
    if library:
        from tocom_export.engines.tensorrt.building import PlanOptions, check_options

        options = PlanOptions(
            refit=refit,
            strip=strip,
            batch=batch,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            timing_cache=out.with_name(f"{out.name}.timing-cache"),
        )
        check_options(library, options)
    if dry_run:
        files = [*plan.files(), *plans, *(f"{name}.json" for name in plans)]
        why = no_trtexec(library, options) if library and options else ""
        lines = trtexec_lines(plan, out, options) if options and not why else []
        output.document({"bundle": str(out), "files": files, "trtexec": lines})
        output.table(["would be written"], [[out / name] for name in files], "")
        if lines and not as_json:
            click.echo("\nThe same graphs by trtexec, which can't mark weights for refit:")
            click.echo("\n".join(lines))
        if why:
            output.note(why)
        return

    if library and options:  # what is missing is to be said before the work
        from tocom_export.engines.tensorrt.building import check_can_build
        from tocom_export.engines.tensorrt.library import open_library

        check_can_build(open_library(library), options)
    checks: list[Comparison] = []

    def check(bundle: Bundle) -> None:
        checks.extend(_check(plan, bundle, verify, output))

    def extend(bundle: Bundle) -> Bundle:
        assert library is not None and options is not None
        return add_plans(bundle, library, options, verify is not False, output)

    output.detail(f"{', '.join(engine)} in {precision} from {plan.checkpoint.file}")
    with output.progress("writing", len(plan.files())) as advance:

        def step(name: str) -> None:
            advance(name)
            output.detail(f"writing {out / name}")

        bundle = write_bundle(
            plan,
            out,
            force=force,
            progress=step,
            extend=extend if library else None,
            check=check,
            calibrate=_calibration(plan, calibrate, output) if calibrate else None,
        )
    _report(plan, bundle, checks, time.perf_counter() - started, output)


def _calibration(plan: BuildPlan, folder: Path, output: Output) -> Calibrate:
    """What measures the ranges of int8 on the images in a folder."""
    from tocom_export.engines.onnx.calibration import input_scales
    from tocom_export.model.preprocess import find_images

    files = find_images(folder)
    chosen = files[:: -(-len(files) // CALIBRATION_IMAGES)]  # spread over all classes
    if len(chosen) < FEW_IMAGES:
        output.note(
            f"--calibrate {folder} has {len(chosen)} images: what others need may be cut off; "
            "some hundreds are better."
        )
    images = plan.preprocess.load_batch(chosen, plan.spec.image_size)
    return lambda bundle, target: input_scales(bundle, target, images)


def _check(
    plan: BuildPlan, bundle: Bundle, verify: bool | None, output: Output
) -> list[Comparison]:
    """Run every engine once; against the PyTorch model where that can be had.

    Raises:
        CheckFailed: an engine differs from the model, or its logits are not finite.
    """
    if verify is False:
        return []
    if not installed("onnxruntime"):
        output.note("Not checked: onnxruntime is not installed (pip install 'tocom-export[cpu]').")
        return []
    from tocom_export.engines.verify import compare, sample_images

    reference = None
    if installed("torch", "timm"):
        from tocom_export.training.torch_engine import Reference

        reference = Reference(bundle, plan.bank)
    checks = []
    images = sample_images(bundle.spec)
    with output.progress("checking", len(bundle.targets)) as advance:
        for comparison in compare(bundle, images, reference):
            advance(f"r{comparison.target:02d}")
            checks.append(comparison)
    if failed := [c for c in checks if not c.passed]:
        worst = failed[0]
        what = (
            f"differs from the PyTorch model {worst.difference}"
            if worst.finite
            else "gives logits that are not numbers"
        )
        raise CheckFailed(
            f"the engine at degree {worst.target} {what}; no bundle was written. "
            "Please report this."
        )
    return checks


def _report(
    plan: BuildPlan, bundle: Bundle, checks: list[Comparison], seconds: float, output: Output
) -> None:
    from tocom_export.compression.schedule import TokenSchedule

    by_target = {check.target: check for check in checks}
    dense = TokenSchedule.of(bundle.spec, 0).multiply_adds(bundle.spec)
    total = bundle.size()
    rows, documents = [], []
    for target, tokens in bundle.targets.items():
        cost = TokenSchedule.of(bundle.spec, target).multiply_adds(bundle.spec)
        check = by_target.get(target)
        documents.append(
            {
                "target": target,
                "graph": str(bundle.graph(target)),
                "tokens": list(tokens),
                "multiply_adds": cost,
                "check": check.to_json() if check else None,
            }
        )
        delta = (
            "-" if check is None or check.max_difference is None else f"{check.max_difference:.1e}"
        )
        agree = "-" if check is None or check.agreement is None else f"{check.agreement:.0f} %"
        rows.append(
            [
                bundle.graph(target).name,
                target,
                f"{bundle.spec.tokens} → {tokens[-1]}",
                f"{cost / 1e6:.1f} M",
                f"{dense / cost:.2f}×",
                delta,
                agree,
            ]
        )
    output.document(
        {
            "bundle": str(bundle.path),
            "model": bundle.spec.model,
            "source": bundle.source,
            "scale": bundle.scale,
            "compensated": bundle.compensated,
            "precision": bundle.precision,
            "method": bundle.method.name,
            "bytes": total,
            "seconds": round(seconds, 3),
            "targets": documents,
        }
    )
    columns = ["engine", "degree", "tokens", "multiply-adds", "fewer by", "max |Δ|", "same top-1"]
    title = f"{bundle.spec.model}, source {bundle.source}" + (
        f", ToCom scale {bundle.scale}" if bundle.compensated else ", not compensated"
    )
    output.table(columns, rows, title)
    for check in checks:
        if check.beyond:
            output.note(
                f"r{check.target:02d}: {check.beyond} of {check.images} images differ by more than "
                "rounding; two pairs of tokens are equally similar there, and either may be merged."
            )
    if checks and checks[0].max_difference is None:
        output.note("Engines run and give numbers; torch is not installed to compare them with.")
    output.note(f"Wrote {bundle.path}: {megabytes(total)} in {seconds:.1f} s.")

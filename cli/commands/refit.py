"""``tocom-export refit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from ..model_options import checkpoint_options
from ..options import (
    DEGREE,
    FILE,
    FiniteFloat,
    common_options,
    host_code_option,
    take_output,
    wait_option,
)
from ..output import Command, Output

if TYPE_CHECKING:
    from tocom_export.bundle.weights import ModelWeights
    from tocom_export.engines.verify import Comparison
    from tocom_export.variant import Variant


@click.command("refit", cls=Command)
@click.argument("engine", type=FILE, metavar="BUNDLE|ENGINE")
@checkpoint_options(
    "Other weights; default: the bundle's own, which are rounded unless it is in fp32."
)
@click.option(
    "--bank",
    metavar="FILE",
    help="ToCom bank; 'none': no compensation; default: none for a variant that has none, for "
    "'reference' the shipped one.",
)
@click.option(
    "--source",
    type=DEGREE,
    help="Degree the weights were trained at, where they don't say it; default: as before.",
)
@click.option("--scale", type=FiniteFloat(0), help="ToCom scale; default: as before.")
@click.option("--out", type=FILE, metavar="FILE", help="Write a plan there; default: in its place.")
@host_code_option
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Compare it with PyTorch before anything is kept; default where torch is installed. It is "
    "run anyway, and must give finite numbers.",
)
@wait_option
@common_options
def refit_command(
    engine: Path,
    out: Path | None,
    host_code: bool,
    verify: bool | None,
    wait: bool,
    **options: Any,
) -> None:
    """Put other weights into a bundle or an engine, without building it again.

    A bundle's variants get them all at once, or, where anything goes wrong, none. An ENGINE is a
    variant's .onnx within its bundle, or a .plan with its .plan.json. The weights are those of
    --checkpoint, compensated from --source to what each variant removes. An .onnx alone can be
    given what it doesn't share with the bundle's others; a plan what it lets go of (build --refit
    qkv or all).

    \b
    Examples:
      tocom-export refit mine-source0 --checkpoint other.safetensors
      tocom-export refit mine-source0/r08.onnx --scale 0.2
      tocom-export refit mine-source0/r08.plan --checkpoint other.safetensors --source 4
    """
    output = take_output(options)
    if not engine.exists():
        raise InputError(f"{engine}: no such file or folder.")
    if engine.suffix == ".plan":
        from tocom_export.plan_refitting import refit_plan

        plan = refit_plan(
            engine, out, host_code=host_code, verify=verify, wait=wait, tell=output.note, **options
        )
        documents = [
            _describe(
                out or engine, plan.record.variant, plan.weights, options["bank"], plan.comparison
            )
        ]
    elif out:
        raise InputError("`out` is for plans; an ONNX engine's weights lie in its bundle.")
    elif host_code:
        raise InputError("`host_code` is for plans.")
    else:
        documents = _refit_graphs(engine, verify, wait, options, output)
    output.document({"engines": documents} if engine.is_dir() else documents[0])
    _report(documents, output)


def _refit_graphs(
    engine: Path, verify: bool | None, wait: bool, options: Any, output: Output
) -> list[dict[str, Any]]:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.refitting import refit

    folder, names = engine, None
    if not engine.is_dir():
        if engine.suffix != ".onnx":
            raise InputError(f"{engine}: name a bundle, or one of its .plan and .onnx engines.")
        folder, names = engine.parent, [engine.stem]
        variants = Bundle.open(folder).variants
        if engine.stem not in variants:
            have = ", ".join(f"{name}.onnx" for name in variants)
            raise InputError(f"{engine} is no engine of the bundle around it, which has {have}.")
    done = refit(folder, names, verify=verify, wait=wait, tell=output.note, **options)
    return [
        _describe(
            done.bundle.graph(name), variant, done.weights, options["bank"],
            done.comparisons.get(name),
        )
        for name, variant in done.variants.items()
    ]  # fmt: skip


def _describe(
    engine: Path,
    variant: Variant,
    new: ModelWeights,
    bank: str | None,
    check: Comparison | None,
) -> dict[str, Any]:
    return {
        "engine": str(engine),
        "variant": variant.name,
        "degrees": list(variant.degrees),
        "checkpoint": str(new.checkpoint.file),
        "source": variant.source,
        "scale": variant.scale,
        "compensated": variant.baked,
        "bank": (bank or "of the package") if new.bank else "none",
        "check": check.to_json() if check else None,
    }


def _report(documents: list[dict[str, Any]], output: Output) -> None:
    columns = ["engine", "variant", "source", "scale", "max |Δ|"]
    rows, deltas = [], []
    for document in documents:
        deltas.append((document["check"] or {}).get("max_difference"))
        shown = "-" if deltas[-1] is None else f"{deltas[-1]:.1e}"
        rows.append([*(document[name] for name in columns[:-1]), shown])
    output.table(columns, rows, "")
    if None in deltas:
        output.note("Not compared with PyTorch, as asked, or for want of torch and timm.")
    what = f"{len(documents)} engines" if len(documents) > 1 else documents[0]["engine"]
    output.note(f"Refitted {what} with {documents[0]['checkpoint']}; bank: {documents[0]['bank']}.")

"""``tocom-export refit``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError
from tocom_export.loading import is_installed

from ..options import DEGREE, FILE, FiniteFloat, common_options, host_code_option, take_output
from ..output import Command, Output

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.bundle.weights import ModelWeights
    from tocom_export.engines.tensorrt.plan import PlanRecord
    from tocom_export.engines.verify import Comparison
    from tocom_export.variant import Variant


@click.command("refit", cls=Command)
@click.argument("engine", type=FILE)
@click.option(
    "--checkpoint",
    type=FILE,
    metavar="FILE",
    help="Other weights; default: the bundle's own, which are rounded unless it is in fp32.",
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
    help="Degree the weights were trained at; default: what their metadata say, else as before.",
)
@click.option("--scale", type=FiniteFloat(0), help="ToCom scale; default: as before.")
@click.option("--out", type=FILE, metavar="FILE", help="Write a plan there; default: in its place.")
@host_code_option
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Run it against PyTorch before anything is kept; default where torch is installed.",
)
@common_options
def refit_command(
    engine: Path, out: Path | None, host_code: bool, verify: bool | None, **options: Any
) -> None:
    """Put other weights into an engine, without building it again.

    ENGINE is a .plan with its .plan.json, or a variant's .onnx within its bundle. The weights are
    those of --checkpoint, compensated from --source to what the variant removes. A plan lets go of
    the weights that it was built for (build --refit qkv or all); of an ONNX engine the weights
    that it doesn't share with the bundle's others are replaced.

    \b
    Examples:
      tocom-export refit mine-source0/r08.onnx --source 4
      tocom-export refit mine-source0/r08.plan --checkpoint other.safetensors --source 4
    """
    output = take_output(options)
    if not engine.exists():
        raise InputError(f"{engine}: no such file.")
    if engine.suffix not in (".plan", ".onnx"):
        raise InputError(f"{engine}: name one of a bundle's .plan and .onnx engines.")
    plan = engine.suffix == ".plan"
    if out and not plan:
        raise InputError("`out` is for plans; an ONNX engine's weights lie in its bundle.")
    can_verify = is_installed("torch", "timm") and (plan or is_installed("onnxruntime"))
    if verify and not can_verify:
        raise InputError(
            "`verify` needs torch and timm: pip install 'tocom-export[torch]'."
            if plan
            else "`verify` needs torch, timm and onnxruntime: pip install "
            "'tocom-export[cpu,torch]'."
        )
    verify = can_verify if verify is None else verify
    if plan:
        document = _refit_plan(engine, out or engine, host_code, verify, options, output)
    else:
        document = _refit_graph(engine, verify, options)
    output.document(document)
    _report(document, output)


def _refit_plan(
    engine: Path, out: Path, host_code: bool, verify: bool, options: Any, output: Output
) -> dict[str, Any]:
    from tocom_export.bundle.manifest import WEIGHTS
    from tocom_export.engines.tensorrt.plan import open_plan
    from tocom_export.engines.tensorrt.refit import refit_plan
    from tocom_export.refitting import prepare_refit

    _, record = open_plan(engine)
    own = engine.with_name(WEIGHTS)
    if options["checkpoint"] is None and not own.exists():
        raise InputError(f"`checkpoint`: there is no {own} to take the weights from; name a file.")
    new, variant = prepare_refit(record, record.variant, own, **options)
    checks: list[Comparison] = []

    def check(opened: Any) -> None:
        checks.append(_compare(opened.run, new, variant, record, engine, opened.largest))

    changed = refit_plan(engine, variant, new, out, check if verify else None, host_code=host_code)
    if changed.refit == "none":
        output.note(
            f"{changed.backend} {changed.version} saved a plan that can't be refitted again."
        )
    return _describe(out, variant, new, options["bank"], checks)


def _refit_graph(engine: Path, verify: bool, options: Any) -> dict[str, Any]:
    from tocom_export.bundle.manifest import WEIGHTS
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.onnx.refit import refit_graph
    from tocom_export.refitting import prepare_refit

    bundle = Bundle.open(engine.parent)
    if engine.stem not in bundle.variants:
        have = ", ".join(bundle.graph(name).name for name in bundle.variants)
        raise InputError(f"{engine} is no engine of the bundle around it, which has {have}.")
    present = bundle.variants[engine.stem]
    new, variant = prepare_refit(bundle, present, bundle.path / WEIGHTS, **options)
    checks: list[Comparison] = []

    def check(opened: Bundle) -> None:
        run = opened.engine(variant.name).run
        checks.append(_compare(run, new, variant, opened, engine))

    refit_graph(bundle, variant, new, check if verify else None)
    return _describe(engine, variant, new, options["bank"], checks)


def _compare(
    run: Callable[[Any], Any],
    new: ModelWeights,
    variant: Variant,
    now: PlanRecord | Bundle,
    engine: Path,
    batch: int | None = None,
) -> Comparison:
    """The refitted engine against PyTorch with the checkpoint's weights and the bank beside them.

    Raises:
        CheckFailed: it says something else.
    """
    from tocom_export.engines.verify import compare, sample_images
    from tocom_export.training.torch_engine import BankOracle, load_model

    model = load_model(now.spec, new.checkpoint.tensors, now.method)
    oracle = BankOracle(model, new.bank)
    found = compare(
        run, sample_images(now.spec), oracle.runner(variant), engine.name, variant.name,
        now.precision, batch=batch or 16,
    )  # fmt: skip
    found.require("the PyTorch model", "it was left as it was.")
    return found


def _describe(
    engine: Path,
    variant: Variant,
    new: ModelWeights,
    bank: str | None,
    checks: list[Comparison],
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
        "check": checks[0].to_json() if checks else None,
    }


def _report(document: dict[str, Any], output: Output) -> None:
    check = document["check"]
    delta = f"{check['max_difference']:.1e}" if check else "-"
    columns = ["engine", "variant", "source", "scale", "max |Δ|"]
    row = [document["engine"], document["variant"], document["source"], document["scale"], delta]
    output.table(columns, [row], "")
    if check is None:
        output.note("Not compared with PyTorch: that wants torch, timm and --verify.")
    output.note(
        f"Refitted {document['engine']} with {document['checkpoint']}; bank: {document['bank']}."
    )

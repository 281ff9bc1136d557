"""``tocom-export refit``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import CheckFailed, InputError

from ..output import (
    DEGREE,
    FILE,
    Command,
    FiniteFloat,
    Output,
    common_options,
    installed,
    output_of,
)

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle, Refitted
    from tocom_export.engines.refit import NewWeights
    from tocom_export.engines.tensorrt.plan import PlanRecord
    from tocom_export.engines.verify import Comparison


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
    help="ToCom bank; default for 'reference': the shipped one; 'none': no compensation.",
)
@click.option(
    "--source",
    type=DEGREE,
    help="Degree the weights were trained at; default: what their metadata say, else as before.",
)
@click.option("--scale", type=FiniteFloat(0), help="ToCom scale; default: as before.")
@click.option("--out", type=FILE, metavar="FILE", help="Write a plan there; default: in its place.")
@click.option(
    "--host-code",
    is_flag=True,
    help="Let a version-compatible plan run the code that it brings along.",
)
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Run it against PyTorch before anything is kept; default where torch is installed.",
)
@common_options
def refit_command(
    engine: Path,
    checkpoint: Path | None,
    bank: str | None,
    source: int | None,
    scale: float | None,
    out: Path | None,
    host_code: bool,
    verify: bool | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Put other weights into an engine, without building it again.

    ENGINE is a .plan with its .plan.json, or an rNN.onnx within its bundle. The weights are those
    of --checkpoint, compensated from --source to the engine's degree. A plan lets go of the
    weights that it was built for (build --refit qkv or all); of an ONNX engine the weights that it
    doesn't share with the bundle's others are replaced.

    \b
    Examples:
      tocom-export refit mine-source0/r08.onnx --source 4
      tocom-export refit mine-source0/r08.plan --checkpoint other.safetensors --source 4
    """
    output = output_of(as_json, verbose, quiet)
    if verify and not installed("torch", "timm"):
        raise InputError("--verify needs torch and timm: pip install 'tocom-export[torch]'.")
    if not engine.exists():
        raise InputError(f"{engine}: no such file.")
    verify = installed("torch", "timm") if verify is None else verify
    if engine.suffix == ".plan":
        document = _plan(engine, checkpoint, bank, source, scale, out, host_code, verify, output)
    elif engine.suffix == ".onnx":
        if out:
            raise InputError("--out is for plans; an ONNX engine's weights lie in its bundle.")
        document = _graph(engine, checkpoint, bank, source, scale, verify)
    else:
        raise InputError(f"{engine}: .plan and .onnx engines are refitted.")
    output.document(document)
    _report(document, output)


def _plan(
    engine: Path,
    checkpoint: Path | None,
    bank: str | None,
    source: int | None,
    scale: float | None,
    out: Path | None,
    host_code: bool,
    verify: bool,
    output: Output,
) -> dict[str, Any]:
    from tocom_export.bundle.opening import WEIGHTS
    from tocom_export.engines.refit import refit_plan
    from tocom_export.engines.tensorrt.engine import TensorRtEngine
    from tocom_export.engines.tensorrt.plan import open_plan

    _, record = open_plan(engine)
    own = engine.with_name(WEIGHTS)
    if checkpoint is None and not own.exists():
        raise InputError(f"--checkpoint: there is no {own} to take the weights from; name a file.")
    new = _new(record, record, checkpoint, own, bank, source, scale)
    checks: list[Comparison] = []

    def check(opened: TensorRtEngine) -> None:
        checks.append(_compared(opened.run, new, record, record.target, record.batch[2]))

    judge = check if verify else None
    changed = refit_plan(engine, new, out or engine, judge, host_code=host_code)
    if changed.refit == "none":
        output.note(
            f"{changed.library} {changed.version} saved a plan that can't be refitted again."
        )
    return _document(out or engine, changed.target, new, bank, checks)


def _graph(
    engine: Path,
    checkpoint: Path | None,
    bank: str | None,
    source: int | None,
    scale: float | None,
    verify: bool,
) -> dict[str, Any]:
    from tocom_export.bundle.opening import WEIGHTS, Bundle
    from tocom_export.engines.onnx.engine import OnnxEngine
    from tocom_export.engines.refit import refit_graph

    bundle = Bundle.open(engine.parent)
    named = re.fullmatch(r"r(\d\d)\.onnx", engine.name)
    if not named or int(named[1]) not in bundle.targets:
        have = ", ".join(bundle.graph(target).name for target in bundle.targets)
        raise InputError(f"{engine} is no engine of the bundle around it, which has {have}.")
    target = int(named[1])
    before = bundle.refitted.get(target, bundle)
    new = _new(bundle, before, checkpoint, bundle.path / WEIGHTS, bank, source, scale)
    checks: list[Comparison] = []

    def check(opened: Bundle) -> None:
        checks.append(_compared(OnnxEngine(opened, target).run, new, opened, target))

    refit_graph(bundle, target, new, check if verify and installed("onnxruntime") else None)
    return _document(engine, target, new, bank, checks)


def _new(
    now: PlanRecord | Bundle,
    before: PlanRecord | Bundle | Refitted,
    checkpoint_file: Path | None,
    own: Path,
    bank_name: str | None,
    source: int | None,
    scale: float | None,
) -> NewWeights:
    """What the options ask for, checked against what the engine is now.

    Args:
        before: whose source and scale hold where the options and the file name none.
    """
    from tocom_export.compression.checkpoint import Checkpoint
    from tocom_export.engines.refit import NewWeights, base_checkpoint

    from ..resolve import open_bank

    checkpoint = (
        Checkpoint.open(checkpoint_file)
        if checkpoint_file
        else base_checkpoint(Checkpoint.open(own), now.spec, now.precision)
    )
    trained = checkpoint.info.source if checkpoint_file else None
    if None not in (source, trained) and source != trained:
        raise InputError(
            f"--source {source}, but {checkpoint.file} was trained at degree {trained} by its "
            "metadata; leave --source out."
        )
    bank = open_bank(bank_name, now.spec, now.method.name, checkpoint.info)
    if bank is not None:
        bank.check(now.spec, now.method, f"--bank {bank_name or 'of the package'}")
    chosen = next(s for s in (source, trained, before.source) if s is not None)
    return NewWeights(checkpoint, bank, chosen, before.scale if scale is None else scale)


def _compared(
    run: Any, new: NewWeights, now: PlanRecord | Bundle, target: int, batch: int = 16
) -> Comparison:
    """The refitted engine against PyTorch with the checkpoint's weights and the bank beside them.

    Raises:
        CheckFailed: it says something else.
    """
    from tocom_export.engines.verify import compare_engine, sample_images
    from tocom_export.training.evaluate import runner
    from tocom_export.training.lora import TrainableBank
    from tocom_export.training.torch_engine import load_model

    model = load_model(now.spec, new.checkpoint.tensors, now.method)
    steps = TrainableBank.from_bank(new.bank, now.spec) if new.bank else None
    side = steps.side(new.source, target, new.scale) if steps else None
    images = sample_images(now.spec)
    found = compare_engine(
        run, target, now.precision, images, runner(model, target, side), batch=batch
    )
    if not found.passed:
        raise CheckFailed(
            f"refitted, the engine at degree {target} differs from the PyTorch model "
            f"{found.difference}; it was left as it was."
        )
    return found


def _document(
    engine: Path, target: int, new: NewWeights, bank: str | None, checks: list[Comparison]
) -> dict[str, Any]:
    return {
        "engine": str(engine),
        "target": target,
        "checkpoint": str(new.checkpoint.file),
        "source": new.source,
        "scale": new.scale,
        "compensated": new.bank is not None and target != new.source,
        "bank": bank or "of the package",
        "check": checks[0].to_json() if checks else None,
    }


def _report(document: dict[str, Any], output: Output) -> None:
    check = document["check"]
    delta = f"{check['max_difference']:.1e}" if check else "-"
    columns = ["engine", "degree", "source", "scale", "max |Δ|"]
    row = [document["engine"], document["target"], document["source"], document["scale"], delta]
    output.table(columns, [row], "")
    output.note(
        f"Refitted {document['engine']} with {document['checkpoint']}; bank: {document['bank']}."
    )

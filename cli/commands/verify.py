"""``tocom-export verify``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import CheckFailed, InputError, MissingPackageError
from tocom_export.loading import is_installed

from ..accuracy_table import show_checks
from ..evaluate_options import BACKEND, place_options
from ..options import DATA_HELP, FILE, FiniteFloat, common_options, take_output
from ..output import Command, Output

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.accuracy import AccuracyCheck
    from tocom_export.engines.verify import Comparison

GRAPHS, PLANS = ("onnx", "openvino"), ("tensorrt", "tensorrt-rtx")
_BATCH = 64


@click.command("verify", cls=Command)
@click.argument("bundle", type=FILE)
@click.option(
    "--atol",
    type=FiniteFloat(0),
    help="What |Δ| may be, on each image; default: by precision, as above.",
)
@click.option(
    "--images",
    type=FILE,
    metavar="DIR",
    help="Image files to compare on, 100 at most; default: 20 generated ones.",
)
@click.option(
    "--data",
    metavar="LABELLED",
    help=f"Labelled images to measure accuracy on, beside PyTorch's. {DATA_HELP}",
)
@place_options
@click.option(
    "--backend",
    type=BACKEND,
    help="What runs the engines; default: onnx, and the plans that can be run here.",
)
@common_options
def verify_command(
    bundle: Path, atol: float | None, images: Path | None, backend: Any, **options: Any
) -> None:
    """Hold every engine of a bundle against the PyTorch model.

    Checks the files' hashes, then max |Δ| of each output (the worst is told), top-1 agreement, and
    that nothing is NaN or Inf; of TensorRT plans, too, where they can be run here. The model has
    the bundle's own weights: what rounding them costs is not seen (--data sees it). OpenVINO is
    held to float32.

    Exit status 1 where an engine fails: where a value is beyond --atol on any image or, without
    it, beyond a share of its output's largest on more than one image in twenty in fp32 (0.0001), on
    more than half of them in fp16 (0.002), bf16 (0.02) and int8 (0.1). Two pairs of tokens can
    be equally similar to within rounding, and either may be merged.

    --data judges a precision by what it is for. Each engine's top-1 accuracy is set beside that of
    PyTorch with float32 weights: the reference model's, else the bundle's own. An engine fails
    where its logits are NaN or Inf, or where it is worse by more than 0.3 points with 95 %
    certainty: the upper end of the difference's interval, by the images that one of the two gets
    right and the other wrong, is below -0.3. |Δ| then decides in fp32 alone, or with --atol; in
    the other precisions it and agreement are there to find what is wrong.

    \b
    Examples:
      tocom-export verify reference-source0 --images photos/
      tocom-export verify reference-source0 --data tiny-imagenet/val --backend openvino
    """
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.tensorrt.verify_plans import verify_plans
    from tocom_export.engines.verify import sample_images, verify
    from tocom_export.model.preprocess import choose_spread, find_images

    output, place = take_output(options), options.pop("data")
    if place is None and any(options.values()):
        raise InputError("`data_root` and `download` are for `data`.")
    opened = Bundle.open(bundle, hashes=True)
    if not is_installed("torch", "timm"):
        raise MissingPackageError("torch", "torch")
    from tocom_export.training.data.evaluation import open_bundle_data
    from tocom_export.training.torch_engine import make_oracle

    data = open_bundle_data(opened, place, _BATCH, output.note, **options) if place else None
    if images:
        files = choose_spread(find_images(images), 100)
        batch = opened.preprocess.load_batch(files, opened.spec.image_size)
    else:
        batch = sample_images(opened.spec)
    checks: list[Comparison] = []
    skipped: dict[str, str] = {}
    oracle = make_oracle(opened).run_all
    with output.progress("checking", len(opened.variants) + len(opened.plans)) as advance:
        if backend not in PLANS:
            for check in verify(opened, batch, oracle, backend=backend or "onnx", atol=atol):
                advance(check.variant)
                checks.append(check)
        if backend not in GRAPHS:
            plans, skipped = verify_plans(opened, batch, oracle, atol, backend, advance)
            checks += plans
    accuracies: list[AccuracyCheck] = []
    if data:
        from tocom_export.engines.accuracy import verify_accuracy
        from tocom_export.training.torch_engine import Float32Oracle

        checks = [check.leave_to_accuracy() for check in checks]
        engines = [(check.variant, check.backend) for check in checks]
        whole = Float32Oracle(opened)
        accuracies = verify_accuracy(opened, data, whole, engines, progress=output.progress)
    _report(opened, checks, accuracies, skipped, len(batch), output)


def _report(
    bundle: Bundle,
    checks: Sequence[Comparison],
    accuracies: Sequence[AccuracyCheck],
    skipped: dict[str, str],
    images: int,
    output: Output,
) -> None:
    """Raise CheckFailed, after all is told, where an engine failed."""
    failed = [check.engine for check in checks if not check.passed]
    problems = [f"{a.variant} by {a.backend}: {a.failure}" for a in accuracies if not a.passed]
    if failed:
        differ = "differs" if len(failed) == 1 else "differ"
        problems.insert(0, f"{', '.join(failed)} {differ} from the PyTorch model")
    document = {
        "bundle": str(bundle.path),
        "passed": not problems,
        "engines": [check.to_json() for check in checks],
        "not_run": skipped,
    }
    rows = [accuracy.to_json() for accuracy in accuracies]
    output.document({**document, "rows": rows} if rows else document)
    told = bundle.outputs != ("logits",)
    table = [
        [
            c.engine,
            c.backend,
            f"{c.max_difference:.2e}",
            f"{c.tolerance:.2e}",
            f"{c.beyond} of {c.images}",
            "-" if c.agreement is None else f"{c.agreement:.1f} %",
            "yes" if c.finite else "NO",
            ("passed" if c.judged else "not judged") if c.passed else "FAILED",
            *([c.output] if told else []),
        ]
        for c in checks
    ]
    columns = [
        "engine",
        "backend",
        "max |Δ|",
        "allowed",
        "images beyond",
        "same top-1",
        "finite",
        "",
        *(["worst output"] if told else []),
    ]
    output.table(columns, table, f"{bundle.path} against PyTorch, {images} images")
    for name, why in skipped.items():
        output.note(f"{name} was not run: {why}")
    if accuracies:
        show_checks([(bundle.path.name, found) for found in accuracies], "accuracy", output)
    if problems:
        raise CheckFailed(f"{bundle.path}: {'; '.join(problems)}.")

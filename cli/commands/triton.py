"""``tocom-export triton``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..options import FILE, FiniteFloat, Names, common_options, format_megabytes, take_output
from ..output import Command

COUNT = click.IntRange(1, 2**31 - 1)  # an int32 in Triton's messages


@click.command("triton", cls=Command)
@click.argument("bundle", type=FILE)
@click.argument("out", type=FILE)
@click.option("--variants", type=Names(), default=(), help="Variants to serve; default: all.")
@click.option(
    "--backend",
    type=click.Choice(["python", "onnxruntime", "openvino", "tensorrt"]),
    default="onnxruntime",
    help="Triton's backend: onnxruntime and openvino run the bundle's graphs, tensorrt its plans, "
    "in a model for each variant; python runs one model of all, which share their weights.",
)
@click.option(
    "--name",
    help="Models are called <NAME>_<variant>, or <NAME> with --backend python; default: the "
    "model's name.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    help="Where it runs; default: a CPU for graphs, a GPU for plans.",
)
@click.option(
    "--max-batch", type=COUNT, help="Largest batch; default: 32 for graphs, a plan's own."
)
@click.option(
    "--instances",
    type=COUNT,
    default=1,
    help="How many of each model run side by side, on each GPU.",
)
@click.option(
    "--max-delay-ms",
    type=float,
    default=1.0,
    help="How long an image waits for others to fill a batch with.",
)
@click.option(
    "--threads", type=COUNT, help="Threads of an instance on a CPU; default: the runtime's choice."
)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "onnx", "openvino", "tensorrt", "tensorrt-rtx"]),
    help="With --backend python: what runs the engines; default: auto, what was picked on the "
    "machine that serves, else ONNX Runtime.",
)
@click.option(
    "--slo-ms",
    type=FiniteFloat(),
    help="With --backend python: the latency wanted, for which the variant is picked by load.",
)
@click.option(
    "--control",
    is_flag=True,
    help="With --backend python: let requests switch, refit and reload what serves.",
)
@click.option("--force", is_flag=True, help="Replace an existing repository.")
@common_options
def triton_command(
    bundle: Path, out: Path, variants: tuple[str, ...], force: bool, **options: Any
) -> None:
    """Write a Triton Inference Server model repository: one model for each variant of a bundle.

    OUT holds <name>_r08/config.pbtxt, labels.txt where the bundle knows its classes, and 1/ with
    the engine and a copy of its weights. With --backend python it holds one model, <name>, whose
    variant is a parameter of each request or picked by load.

    \b
    Example:
      tocom-export triton reference-source0 models --variants 4,8,12,16
      tocom-export triton reference-source0 models --backend python --slo-ms 50
    """
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.serving.triton import write_repository
    from tocom_export.engines.serving.triton_options import TritonOptions

    output = take_output(options)
    chosen = TritonOptions(**options)
    opened = Bundle.open(bundle)
    with output.progress("writing", len(variants or opened.variants)) as progress:
        models = write_repository(opened, out, chosen, variants, force=force, progress=progress)
    output.document(
        {
            "bundle": str(bundle),
            "repository": str(out),
            "backend": chosen.backend,
            "models": [dataclasses.asdict(model) for model in models],
        }
    )
    rows = [
        [m.name, m.variant or "by request", m.max_batch, format_megabytes(sum(m.files.values()))]
        for m in models
    ]
    output.table(["model", "variant", "largest batch", "size"], rows, "")
    for model in models:
        for file in model.files:
            output.detail(f"{out / file}")
    output.note(f"Wrote {out} for Triton Inference Server.")

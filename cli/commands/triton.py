"""``tocom-export triton``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from ..output import (
    FILE,
    Command,
    Degrees,
    common_options,
    megabytes,
    output_of,
)

COUNT = click.IntRange(1, 2**31 - 1)  # an int32 in Triton's messages


@click.command("triton", cls=Command)
@click.argument("bundle", type=FILE)
@click.argument("out", type=FILE)
@click.option("--targets", type=Degrees(), default=(), help="Degrees to serve; default: all.")
@click.option(
    "--engine",
    type=click.Choice(["onnx", "tensorrt"]),
    default="onnx",
    show_default=True,
    help="What Triton runs: the bundle's graphs by ONNX Runtime, or its TensorRT plans.",
)
@click.option("--name", help="What the models are called, before _rNN; default: the model's name.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    help="Where it runs; default: a CPU for graphs, a GPU for plans.",
)
@click.option(
    "--max-batch",
    type=COUNT,
    help="Largest batch; default: 32 for graphs, a plan's own.",
)
@click.option(
    "--instances",
    type=COUNT,
    default=1,
    show_default=True,
    help="How many of each model run side by side, on each GPU.",
)
@click.option(
    "--max-delay-ms",
    type=float,
    default=1.0,
    show_default=True,
    help="How long an image waits for others to fill a batch with.",
)
@click.option(
    "--threads",
    type=COUNT,
    help="Threads of an instance on a CPU; default: ONNX Runtime's choice.",
)
@click.option("--force", is_flag=True, help="Replace an existing repository.")
@common_options
def triton_command(
    bundle: Path,
    out: Path,
    targets: tuple[int, ...],
    engine: Literal["onnx", "tensorrt"],
    name: str | None,
    device: Literal["cpu", "gpu"] | None,
    max_batch: int | None,
    instances: int,
    max_delay_ms: float,
    threads: int | None,
    force: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Write a Triton Inference Server model repository: one model for each degree of a bundle.

    OUT holds <name>_r08/config.pbtxt, labels.txt where the bundle knows its classes, and 1/ with
    the engine and a copy of its weights.

    \b
    Example:
      tocom-export triton reference-source0 models --targets 4,8,12,16
    """
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.serving.triton import TritonOptions, write_repository

    output = output_of(as_json, verbose, quiet)
    options = TritonOptions(engine, name, device, max_batch, instances, max_delay_ms, threads)
    opened = Bundle.open(bundle)
    with output.progress("Writing", len(targets or opened.targets)) as progress:
        models = write_repository(opened, out, options, targets, force=force, progress=progress)
    output.document(
        {
            "bundle": str(bundle),
            "repository": str(out),
            "engine": engine,
            "models": [
                {
                    "name": model.name,
                    "target": model.target,
                    "max_batch": model.max_batch,
                    "files": dict(model.files),
                }
                for model in models
            ],
        }
    )
    rows = [[m.name, m.target, m.max_batch, megabytes(sum(m.files.values()))] for m in models]
    output.table(["model", "degree", "largest batch", "size"], rows, "")
    for model in models:
        for file in model.files:
            output.detail(f"{out / file}")
    output.note(f"Wrote {out} for Triton Inference Server.")

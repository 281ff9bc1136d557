"""The options of ``bench``, and which of them go together."""

from __future__ import annotations

from pathlib import Path

import click

from tocom_export.errors import InputError

from .options import (
    BATCHES,
    DATA_HELP,
    FILE,
    FiniteFloat,
    Names,
    add_options,
    given_options,
    host_code_option,
)
from .runtime_options import (
    Backends,
    device_option,
    precision_option,
    threads_option,
    tuning_options,
)

bench_options = add_options(
    click.option("--variants", type=Names(), help="Variants to time; default: all."),
    click.option(
        "--backend",
        "backends",
        type=Backends(),
        default="auto",
        help="What runs the variants: one or several of onnx, openvino, tensorrt, tensorrt-rtx; "
        "auto is what --pick found fastest here, else ONNX Runtime; or trtexec alone, NVIDIA's.",
    ),
    device_option,
    precision_option,
    click.option("--batch", type=BATCHES, default="1,8,32", help="Batches to time."),
    threads_option,
    tuning_options,
    click.option("--seconds", type=FiniteFloat(0), default=3.0, help="For each engine and batch."),
    click.option(
        "--peers",
        is_flag=True,
        help="Also time what one would use instead, where it is installed: the dense model "
        "in torch, eager and compiled, in ONNX Runtime as others export and quantise it, and in "
        "OpenVINO; merging as it is commonly written in torch. Each also in what else it can: "
        "bf16, int8.",
    ),
    host_code_option,
    click.option(
        "--pick",
        "picking",
        is_flag=True,
        help="Time all backends and precisions that are installed for this processor, and let "
        "'auto' stand for the fastest from now on, for this bundle on this machine.",
    ),
    click.option("--data", metavar="DATA", help=f"For --pick: labelled images. {DATA_HELP}"),
    click.option(
        "--max-loss",
        type=FiniteFloat(0),
        default=0.3,
        metavar="POINTS",
        help="For --data: accuracy that a variant may lose against float32.",
    ),
    click.option(
        "--slo-ms",
        type=FiniteFloat(0),
        metavar="MS",
        help="Latency wanted: also show what steering by load would do.",
    ),
    click.option(
        "--trace",
        type=FILE,
        metavar="FILE",
        help="Arrivals for --slo-ms, seconds, one a line; default: five made ones.",
    ),
    click.option("--plot", type=FILE, metavar="FILE", help="Write a picture, .png or .svg."),
    click.option("--layers", is_flag=True, help="trtexec: also the layers where time goes."),
    click.option("--dry-run", is_flag=True, help="Print trtexec's lines, and run nothing."),
)


def check_usage(ctx: click.Context) -> None:
    """Raise InputError for options that don't go together."""
    given, trtexec = ctx.params, ctx.params["backends"] == ("trtexec",)
    not_theirs = ("device", "inference_precision", "threads")
    for option in given_options(ctx, not_theirs if trtexec else ("dry_run", "layers")).values():
        raise InputError(f"{option} is {'not ' * trtexec}for --backend trtexec.")
    if trtexec and given["peers"]:
        raise InputError("--peers are timed from Python; choose another --backend than trtexec.")
    if given["dry_run"] and (given["plot"] or given["slo_ms"] is not None):
        raise InputError("--dry-run runs nothing; leave --plot and --slo-ms out.")
    fixed = ("backends", "device", "inference_precision", "hint", "streams", "host_code")
    for option in given_options(ctx, fixed if given["picking"] else ("data", "max_loss")).values():
        does = f"--pick tries all that there is; leave {option} out."
        raise InputError(does if given["picking"] else f"{option} is for --pick.")


def check_plot(file: Path) -> None:
    """Raise before the work, not after it, where a picture can't be written."""
    from tocom_export.study.plot_style import apply_style, check_suffix

    check_suffix(file)
    if not file.parent.is_dir():
        raise InputError(f"--plot {file}: there is no folder {file.parent}.")
    apply_style()

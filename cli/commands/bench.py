"""``tocom-export bench``."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from ..options import (
    BATCHES,
    FILE,
    FiniteFloat,
    Names,
    common_options,
    device_option,
    format_megabytes,
    given_options,
    host_code_option,
    take_output,
)
from ..output import Command, Output

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.bench.report import Report
    from tocom_export.engines.serving.simulation import Arrivals


@click.command("bench", cls=Command)
@click.argument("bundle", type=FILE)
@click.option("--variants", type=Names(), help="Variants to time; default: all.")
@click.option(
    "--backend",
    type=click.Choice(["onnx", "tensorrt", "tensorrt-rtx", "trtexec"]),
    default="onnx",
    help="ONNX Runtime, the bundle's plans from Python, or NVIDIA's trtexec.",
)
@device_option
@click.option("--batch", type=BATCHES, default="1,8,32", help="Batches to time.")
@click.option("--threads", type=click.IntRange(1), help="Of ONNX Runtime on a CPU.")
@click.option("--seconds", type=FiniteFloat(0), default=3.0, help="For each engine and batch.")
@click.option(
    "--peers",
    is_flag=True,
    help="Also time what one would use instead, where it is installed: the dense model "
    "in torch, eager and compiled, merging as it is commonly written in torch, and what "
    "torch.onnx.export and Optimum write.",
)
@host_code_option
@click.option(
    "--slo-ms",
    type=FiniteFloat(0),
    metavar="MS",
    help="Latency wanted: also show what steering by load would do at the smallest batch.",
)
@click.option(
    "--trace",
    type=FILE,
    metavar="FILE",
    help="Arrivals for --slo-ms, seconds, one a line; default: four made ones.",
)
@click.option("--plot", type=FILE, metavar="FILE", help="Write a picture, .png or .svg.")
@click.option("--layers", is_flag=True, help="trtexec: also the layers where time goes.")
@click.option("--dry-run", is_flag=True, help="Print trtexec's lines, and run nothing.")
@common_options
@click.pass_context
def bench_command(
    ctx: click.Context,
    /,
    bundle: Path,
    slo_ms: float | None,
    trace: Path | None,
    plot: Path | None,
    dry_run: bool,
    layers: bool,
    **options: Any,
) -> None:
    """Time the variants of a bundle: latency, throughput, and the speed-up over the dense model.

    From Python the engines take turns, and times include copies to the engine and back;
    trtexec's are the GPU's alone. Where trtexec is not on the PATH, plans are timed from Python.
    "of bound" is the speed-up over the one that MACs alone would give. Memory is that of a
    process which runs the one engine at the largest batch (PSS, Linux).

    \b
    Examples:
      tocom-export bench reference-source0 --batch 8
      tocom-export bench reference-source0 --batch 1,8 --peers --plot speed.svg
      tocom-export bench reference-source0 --batch 1 --slo-ms 50
      tocom-export bench deit-source0 --backend trtexec --layers
    """
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.bench.trtexec import time_plans, write_lines

    output = take_output(options)
    opened = Bundle.open(bundle)
    _check_options(ctx)
    traces = _read_trace(trace, slo_ms)
    if plot:
        _check_plot(plot)
    of_plans = {name: options[name] for name in ("variants", "batch", "seconds", "host_code")}
    of_plans["layers"] = layers
    if dry_run:
        lines = [shlex.join(line) for line in write_lines(opened, **of_plans).values()]
        output.document({"lines": lines})
        if not output.as_json:
            click.echo("\n".join(lines))
        return
    report = None
    if options["backend"] == "trtexec":
        options["backend"] = "tensorrt"
        steps = len(options["variants"] or opened.variants) * len(options["batch"])
        with output.progress("trtexec", steps) as advance:
            report = time_plans(opened, progress=advance, log=output.detail, **of_plans)
        if report is None:
            output.note("trtexec is not on the PATH: timed from Python, copies included.")
    report = report or _time_bundle(opened, options, output)
    if slo_ms is not None:
        report = report.steer(slo_ms / 1000, traces)
    document = report.to_json()
    output.document(document)
    _print_report(report, document, output)
    if plot:
        report.plot(plot)
        output.note(f"Wrote {plot}.")


def _check_options(ctx: click.Context) -> None:
    """Raise InputError for options that don't go together."""
    backend = ctx.params["backend"]
    for owner, names in (("trtexec", ("dry_run", "layers")), ("onnx", ("device",))):
        for option in given_options(ctx, names).values():
            if backend != owner:
                raise InputError(f"{option} is for --backend {owner}.")
    if backend == "trtexec" and ctx.params["peers"]:
        raise InputError("--peers are timed from Python; choose another --backend than trtexec.")
    if ctx.params["dry_run"] and (ctx.params["plot"] or ctx.params["slo_ms"] is not None):
        raise InputError("--dry-run runs nothing; leave --plot and --slo-ms out.")


def _read_trace(trace: Path | None, slo_ms: float | None) -> dict[str, Arrivals]:
    if slo_ms == 0:
        raise InputError("--slo-ms 0: a latency is more than nothing.")
    if trace is None:
        return {}
    if slo_ms is None:
        raise InputError("--trace is for --slo-ms.")
    from tocom_export.engines.serving.simulation import read_arrivals

    return {str(trace): read_arrivals(trace)}


def _check_plot(file: Path) -> None:
    """Raise before the work, not after it, where a picture can't be written."""
    from tocom_export.study.plot_style import apply_style, check_suffix

    check_suffix(file)
    if not file.parent.is_dir():
        raise InputError(f"--plot {file}: there is no folder {file.parent}.")
    apply_style()


def _time_bundle(bundle: Bundle, options: dict[str, Any], output: Output) -> Report:
    from tocom_export.engines.bench.run import time_bundle

    with tempfile.TemporaryDirectory() as folder:
        peers: list[Any] = []
        if options.pop("peers"):
            from tocom_export.training.peers import open_peers

            on_cpu = (options["backend"], options["device"]) == ("onnx", "cpu")
            device: Any = "cpu" if on_cpu else "cuda"
            with output.progress("opening", 7) as tell:
                peers += open_peers(bundle, device, options["threads"], Path(folder), tell)
        subjects = len(options["variants"] or bundle.variants) + len(peers)
        with output.progress("timing", subjects * (len(options["batch"]) + 1)) as advance:
            return time_bundle(bundle, peers=peers, progress=advance, **options)


def _print_report(report: Report, document: Mapping[str, Any], output: Output) -> None:
    """The tables of what ``--json`` holds, and a word on what they lack."""
    rows = document["rows"]
    backends = dict.fromkeys(row["backend"] for row in rows if not row["peer"])
    title = f"{report.bundle.path}, {', '.join(backends)}, {report.bundle.precision}"
    columns = ["", "batch", "median ms", "10 to 90 %", "p99 ms", "images/s"]
    columns += [f"over {report.dense or 'r00'}", "of bound", "MACs saved", "memory"]
    output.table(columns, [_format_row(row) for row in rows], f"{title}, on {report.device}")
    for name, layers in document["layers"].items():
        rows = [[x["name"][:60], f"{x['average_ms']:.3f}", f"{x['share']:.1f} %"] for x in layers]
        output.table(["layer", "ms", "share"], rows, name)
    columns = ["", "in time", "answered by", "accuracy", "median ms", "p99 ms", "switches"]
    for trace, found in document["steering"].items():
        title = f"{trace}, {found['steered']['requests']} requests, simulated with these times"
        outcomes = {"steered": found["steered"], **found["fixed"]}
        rows = [_format_outcome(name, outcome) for name, outcome in outcomes.items()]
        output.table(columns, rows, title)
    for line in report.not_timed:
        output.note(f"Not timed: {line}")
    if report.dense is None:
        output.note("No variant of degree 0 was timed to compare with.")
    for row in document["rows"]:
        if not row["peer"] and (row["speed_up"] or 1) < 1:
            output.note(
                f"{row['name']} is slower than {report.dense} at batch {row['batch']}: removing "
                "tokens pays when the batch fills the device."
            )


def _format_row(row: Mapping[str, Any]) -> list[object]:
    bound, of_bound = row["bound"], row["of_bound"]
    return [
        row["name"],
        row["batch"],
        f"{row['median_ms']:.2f}",
        f"{row['low_ms']:.2f} to {row['high_ms']:.2f}",
        f"{row['p99_ms']:.2f}",
        f"{row['images_per_s']:.1f}",
        f"{row['speed_up']:.2f}×" if row["speed_up"] else "-",
        f"{100 * of_bound:.0f} %" if of_bound and bound != 1 else "-",
        f"{100 - 100 / bound:.0f} %" if bound else "-",
        format_megabytes(row["memory"]) if row["memory"] else "-",
    ]


def _format_outcome(name: str, outcome: Mapping[str, Any]) -> list[object]:
    return [
        name,
        f"{outcome['met']:.1f} %",
        ", ".join(f"{variant} {share:.1f} %" for variant, share in outcome["shares"].items()),
        "-" if outcome["accuracy"] is None else f"{outcome['accuracy']:.1f} %",
        f"{outcome['p50_ms']:.1f}",
        f"{outcome['p99_ms']:.1f}",
        outcome["switches"],
    ]

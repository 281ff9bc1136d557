"""``tocom-export bench``."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from ..bench_options import bench_options, check_plot, check_usage
from ..bench_table import print_pick, print_report
from ..options import FILE, common_options, take_output
from ..output import Command, Output
from ..training_options import require_torch

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.bench.picking import Pick
    from tocom_export.engines.bench.report import Report
    from tocom_export.engines.picking import Choice
    from tocom_export.engines.serving.arrivals import Arrivals


@click.command("bench", cls=Command)
@click.argument("bundle", type=FILE)
@bench_options
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
    picking: bool,
    data: str | None,
    max_loss: float,
    backends: tuple[str, ...],
    peers: bool,
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
      tocom-export bench reference-source0 --batch 1 --pick --data photos/test
      tocom-export bench reference-source0 --backend onnx,openvino
      tocom-export bench reference-source0 --batch 1 --slo-ms 50
      tocom-export bench deit-source0 --backend trtexec --layers
    """
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.bench.trtexec import time_plans, write_lines

    output = take_output(options)
    opened = Bundle.open(bundle)
    check_usage(ctx)
    traces = _read_trace(trace, slo_ms)
    if plot:
        check_plot(plot)
    of_plans = {name: options[name] for name in ("variants", "batch", "seconds", "host_code")}
    of_plans["layers"] = layers
    if dry_run:
        lines = [shlex.join(line) for line in write_lines(opened, **of_plans).values()]
        output.document({"lines": lines})
        if not output.as_json:
            click.echo("\n".join(lines))
        return
    report = None
    if backends == ("trtexec",):
        backends = ("tensorrt",)
        steps = len(options["variants"] or opened.variants) * len(options["batch"])
        with output.progress("trtexec", steps) as advance:
            report = time_plans(opened, progress=advance, log=output.detail, **of_plans)
        if report is None:
            output.note("trtexec is not on the PATH: timed from Python, copies included.")
    picked = None
    if picking:
        picked = _pick(opened, data, max_loss, peers, options, output)
        report = picked.report
    report = report or _time_bundle(opened, backends, peers, options, output)
    if slo_ms is not None:
        report = report.steer(slo_ms / 1000, traces)
    document = report.to_json() | ({"pick": picked.to_json()} if picked else {})
    output.document(document)
    print_report(report, document, output)
    if picked:
        print_pick(picked, output)
    if plot:
        report.plot(plot)
        output.note(f"Wrote {plot}.")


def _read_trace(trace: Path | None, slo_ms: float | None) -> dict[str, Arrivals]:
    if slo_ms == 0:
        raise InputError("--slo-ms 0: a latency is more than nothing.")
    if trace is None:
        return {}
    if slo_ms is None:
        raise InputError("--trace is for --slo-ms.")
    from tocom_export.engines.serving.arrivals import read_arrivals

    return {str(trace): read_arrivals(trace)}


def _time_bundle(
    bundle: Bundle, backends: tuple[str, ...], peers: bool, options: dict[str, Any], output: Output
) -> Report:
    from tocom_export.engines.bench.run import time_bundle
    from tocom_export.engines.picking import Choice, resolve

    device, precision = options["device"], options.pop("inference_precision")
    asked = {kind: precision if kind in ("auto", "openvino") else "auto" for kind in backends}
    if precision != "auto" and "auto" not in asked and "openvino" not in asked:
        raise InputError("--inference-precision is for --backend openvino.")
    choices = [Choice(*resolve(bundle, kind, device, asked[kind])) for kind in backends]  # type: ignore[arg-type]
    with _open_peers(bundle, choices, peers, options, output) as others:
        subjects = len(choices) * len(options["variants"] or bundle.variants) + len(others)
        with output.progress("timing", subjects * (len(options["batch"]) + 1)) as advance:
            return time_bundle(bundle, choices=choices, peers=others, progress=advance, **options)


def _pick(
    bundle: Bundle,
    data: str | None,
    max_loss: float,
    peers: bool,
    options: dict[str, Any],
    output: Output,
) -> Pick:
    from tocom_export.engines.bench.picking import pick
    from tocom_export.engines.picking import list_choices

    choices = list_choices(bundle)
    del options["inference_precision"]  # of each choice its own
    batches: Any = None
    if data is not None:
        require_torch()
        from tocom_export.training.data.evaluation import open_bundle_data

        batches = open_bundle_data(bundle, data, 100, output.note)
    with _open_peers(bundle, choices, peers, options, output) as others:
        subjects = len(choices) * len(options["variants"] or bundle.variants) + len(others)
        steps = subjects * (len(options["batch"]) + 1) + (len(batches) if batches else 0)
        with output.progress("timing", steps) as advance:
            return pick(
                bundle, choices, data=batches, max_loss=max_loss, peers=others,
                advance=lambda images: advance("accuracy"), progress=advance, **options,
            )  # fmt: skip


@contextmanager
def _open_peers(
    bundle: Bundle, choices: Sequence[Choice], wanted: bool, options: dict[str, Any], output: Output
) -> Iterator[list[Any]]:
    """What is timed beside them; files that others export are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        if not wanted:
            yield []
            return
        from tocom_export.engines.bench.run import runs_on_cpu
        from tocom_export.engines.verify import sample_images
        from tocom_export.training.peers.opening import STEPS, open_peers

        openvino = all(choice.backend == "openvino" for choice in choices)
        device: Any = "cpu" if openvino or runs_on_cpu(choices, options["device"]) else "cuda"
        images = sample_images(bundle.spec, 32)  # that others' quantisers take ranges from
        with output.progress("opening", STEPS) as tell:
            found = list(
                open_peers(
                    bundle, device, options["threads"], Path(folder), tell,
                    images=images, batches=options["batch"],
                )
            )  # fmt: skip
        yield found

"""``tocom-export bench``."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.cli.common import (
    FILE,
    Command,
    Degrees,
    FiniteFloat,
    Output,
    common_options,
    output_of,
)
from tocom_export.errors import InputError

if TYPE_CHECKING:
    from tocom_export.bundle import Bundle
    from tocom_export.engines.onnxruntime import Provider
    from tocom_export.engines.timing import Timing
    from tocom_export.engines.trtexec import LayerTime

    Timings = dict[tuple[int, int], Timing]
    """(target, batch) → how fast."""
    Layers = dict[int, list[LayerTime]]

SLOWEST = 5
"""Layers of a plan that are named."""


class Counts(click.ParamType[tuple[int, ...]]):
    """Batches to time: ``1,8,32``."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(dict.fromkeys(int(part) for part in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers, such as 1,8,32.", param, ctx)
        if min(counts) < 1:
            self.fail(f"{value!r}: a batch has an image at least.", param, ctx)
        return counts


@click.command("bench", cls=Command)
@click.argument("bundle", type=FILE)
@click.option("--targets", type=Degrees(), help="Degrees to time; default: all of the bundle.")
@click.option(
    "--batch", type=Counts(), default="1,8,32", show_default=True, help="Batches to time."
)
@click.option(
    "--runner",
    type=click.Choice(["onnx", "tensorrt", "tensorrt-rtx", "trtexec"]),
    default="onnx",
    show_default=True,
    help="ONNX Runtime, the bundle's plans from Python, or NVIDIA's trtexec.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Where ONNX Runtime runs.",
)
@click.option("--threads", type=click.IntRange(1), help="Of ONNX Runtime on a CPU.")
@click.option(
    "--seconds",
    type=FiniteFloat(0),
    default=3.0,
    show_default=True,
    help="How long each engine is timed at each batch.",
)
@click.option(
    "--host-code",
    is_flag=True,
    help="Let version-compatible plans run the code that they bring along.",
)
@click.option("--layers", is_flag=True, help="trtexec: also the layers where time goes.")
@click.option("--dry-run", is_flag=True, help="Print trtexec's lines, and run nothing.")
@common_options
def bench_command(
    bundle: Path,
    targets: tuple[int, ...] | None,
    batch: tuple[int, ...],
    runner: str,
    provider: Provider,
    threads: int | None,
    seconds: float,
    host_code: bool,
    layers: bool,
    dry_run: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Time the engines of a bundle: latency, throughput, and the speed-up over degree 0.

    From Python the engines take turns, and times include copies to the engine and back;
    trtexec's are the GPU's alone. Where trtexec is not on the PATH, plans are timed from Python.

    \b
    Examples:
      tocom-export bench reference-source0 --batch 8
      tocom-export bench deit-source0 --runner trtexec --layers
    """
    from tocom_export.bundle import Bundle

    output = output_of(as_json, verbose, quiet)
    opened = Bundle.open(bundle)
    chosen = targets or tuple(opened.targets)
    for target in chosen:
        opened.graph(target) if runner == "onnx" else opened.plan(target)
    if (dry_run or layers) and runner != "trtexec":
        raise InputError(f"--{'dry-run' if dry_run else 'layers'} is for --runner trtexec.")
    if dry_run:
        _lines(opened, chosen, batch, output)
        return
    profiles: Layers = {}
    opener = _opener(opened, runner, provider, threads, host_code)
    if runner == "trtexec" and (program := _program(opened, chosen, output)):
        timings, profiles = _trtexec(program, opened, chosen, batch, seconds, layers, output)
    else:
        timings = _python(opened, chosen, batch, opener, seconds, output)
        runner = "from Python" if runner == "trtexec" else runner
    _report(opened, runner, timings, profiles, output)


def _opener(
    bundle: Bundle, runner: str, provider: Provider, threads: int | None, host_code: bool
) -> Callable[[int], Any]:
    """Target → its engine."""
    if runner == "onnx":
        from tocom_export.engines.onnxruntime import OnnxEngine

        return lambda target: OnnxEngine(bundle, target, provider=provider, threads=threads)
    from tocom_export.engines.tensorrt import TensorRtEngine

    def opened(target: int) -> TensorRtEngine:
        engine = TensorRtEngine(bundle.plan(target), host_code=host_code)
        if runner not in (engine.record.library, "trtexec"):
            raise InputError(
                f"--runner {runner}: {bundle.plan(target)} is of {engine.record.library}."
            )
        return engine

    return opened


def _program(bundle: Bundle, targets: tuple[int, ...], output: Output) -> tuple[Path, int] | None:
    """trtexec and its version; None where it is not on the PATH.

    Raises:
        InputError: it can't run the plans.
    """
    from tocom_export.engines import trtexec
    from tocom_export.engines.plan import open_plan

    program = trtexec.find()
    if program is None:
        output.note("trtexec is not on the PATH: timed from Python, copies included.")
        return None
    for target in targets:
        _, record = open_plan(bundle.plan(target))
        if record.library != "tensorrt":
            raise InputError(
                f"{bundle.plan(target)} is of {record.library}, which trtexec doesn't run; use "
                f"--runner {record.library}."
            )
        if record.stripped:
            raise InputError(f"{bundle.plan(target)} is stripped of its weights; refit it first.")
    return program


def _python(
    bundle: Bundle,
    targets: tuple[int, ...],
    batches: tuple[int, ...],
    opener: Callable[[int], Any],
    seconds: float,
    output: Output,
) -> Timings:
    from tocom_export.engines.compare import sample_images
    from tocom_export.engines.timing import time_engines

    engines = {target: opener(target) for target in targets}
    found: Timings = {}
    with output.progress("timing", len(batches) * len(engines)) as advance:
        for batch in batches:
            images = sample_images(bundle.spec, batch)
            runs = {target: partial(engine.run, images) for target, engine in engines.items()}

            def tell(target: int, batch: int = batch) -> None:
                advance(f"r{target:02d}, batch {batch}")

            timed = time_engines(runs, batch, seconds, tell)
            found |= {(target, batch): timing for target, timing in timed.items()}
    return found


def _trtexec(
    program: tuple[Path, int],
    bundle: Bundle,
    targets: tuple[int, ...],
    batches: tuple[int, ...],
    seconds: float,
    layers: bool,
    output: Output,
) -> tuple[Timings, Layers]:
    """Timings, and the profile of each target at the largest batch."""
    from tocom_export.engines import trtexec

    path, major = program
    found: Timings = {}
    profiles: Layers = {}
    steps = [(target, batch) for target in targets for batch in batches]
    with (
        tempfile.TemporaryDirectory() as name,
        output.progress("trtexec", len(steps)) as advance,
    ):
        times, profile = Path(name, "times.json"), Path(name, "profile.json")
        for target, batch in steps:
            advance(f"r{target:02d}, batch {batch}")
            last = layers and batch == max(batches)
            report = profile if last else None
            line = trtexec.bench_line(
                bundle.plan(target), bundle.spec, batch, major, times, report, seconds
            )
            output.detail(shlex.join(line))
            trtexec.run([str(path), *line[1:]])
            found[target, batch] = trtexec.read_times(times, batch)
            if last:
                profiles[target] = trtexec.read_profile(profile)
    return found, profiles


def _lines(
    bundle: Bundle, targets: tuple[int, ...], batches: tuple[int, ...], output: Output
) -> None:
    """What would be typed, for the version on the PATH, else for 10."""
    from tocom_export.engines import trtexec

    program = trtexec.find()
    major = program[1] if program else 10
    lines = [
        shlex.join(
            trtexec.bench_line(bundle.plan(t), bundle.spec, batch, major, Path("times.json"))
        )
        for t in targets
        for batch in batches
    ]
    output.document({"lines": lines})
    if not output.as_json:
        click.echo("\n".join(lines))


def _report(
    bundle: Bundle, runner: str, timings: Timings, profiles: Layers, output: Output
) -> None:
    rows, documents = [], []
    for (target, batch), timing in sorted(timings.items(), key=lambda item: item[0][::-1]):
        whole = timings.get((0, batch))
        speed_up = timing.throughput / whole.throughput if whole else None
        documents.append({"target": target, **timing.to_json(), "speed_up": speed_up})
        rows.append(
            [
                f"r{target:02d}",
                batch,
                f"{timing.median_ms:.2f}",
                f"{timing.p99_ms:.2f}",
                f"{timing.throughput:.0f}",
                f"{speed_up:.2f}×" if speed_up else "-",
            ]
        )
    slowest = {
        str(target): [asdict(x) for x in found[:SLOWEST]] for target, found in profiles.items()
    }
    output.document(
        {"bundle": str(bundle.path), "runner": runner, "timings": documents, "layers": slowest}
    )
    columns = ["engine", "batch", "median ms", "p99 ms", "images/s", "over r00"]
    output.table(columns, rows, f"{bundle.path}, {runner}, {bundle.precision}")
    for target, found in profiles.items():
        shown = [[x.name[:60], f"{x.average_ms:.3f}", f"{x.share:.1f} %"] for x in found[:SLOWEST]]
        output.table(["layer", "ms", "share"], shown, f"r{target:02d}")
    if 0 not in {target for target, _ in timings}:
        output.note("The bundle has no engine at degree 0 to compare with.")
    slower = [d for d in documents if d["speed_up"] is not None and d["speed_up"] < 1]
    for entry in slower:
        output.note(
            f"r{entry['target']:02d} is slower than r00 at batch {entry['batch']}: removing tokens "
            "pays when the batch fills the device."
        )

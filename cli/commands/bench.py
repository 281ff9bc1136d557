"""``tocom-export bench``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from ..output import (
    FILE,
    Command,
    Degrees,
    FiniteFloat,
    Output,
    common_options,
    output_of,
)

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.bench.report import Report
    from tocom_export.engines.onnx.engine import Provider
    from tocom_export.training.peers import Peer


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
    "--peers",
    is_flag=True,
    help="Also time what one would use instead, where it is installed: the dense model in torch, "
    "eager and compiled, the usual merging in torch, and what torch.onnx.export and Optimum write.",
)
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
    peers: bool,
    slo_ms: float | None,
    trace: Path | None,
    plot: Path | None,
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
    "of bound" is the speed-up over the one that multiply-adds alone would give. Memory is that
    of a process which runs the one engine at the largest batch (PSS, Linux).

    \b
    Examples:
      tocom-export bench reference-source0 --batch 8
      tocom-export bench reference-source0 --batch 1,8 --peers --plot speed.svg
      tocom-export bench reference-source0 --batch 1 --slo-ms 50
      tocom-export bench deit-source0 --runner trtexec --layers
    """
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.bench.report import Report

    output = output_of(as_json, verbose, quiet)
    opened = Bundle.open(bundle)
    chosen = targets or tuple(opened.targets)
    for target in chosen:
        opened.graph(target) if runner == "onnx" else opened.plan(target)
    for option, given in (("--dry-run", dry_run), ("--layers", layers)):
        if given and runner != "trtexec":
            raise InputError(f"{option} is for --runner trtexec.")
    if peers and runner == "trtexec":
        raise InputError("--peers are timed from Python; name another --runner than trtexec.")
    if trace and slo_ms is None:
        raise InputError("--trace is for --slo-ms.")
    if slo_ms == 0:
        raise InputError("--slo-ms 0: a latency is more than nothing.")
    if plot:
        from tocom_export.study.plot_style import check_suffix, look

        check_suffix(plot)
        if not plot.parent.is_dir():
            raise InputError(f"--plot {plot}: there is no folder {plot.parent}.")
        look()  # says what is missing before the work, not after it
    arrivals = {}
    if trace:
        from tocom_export.engines.serving.simulation import recorded

        arrivals = {str(trace): recorded(trace)}
    if dry_run and (plot or slo_ms is not None):
        raise InputError("--dry-run runs nothing; leave --plot and --slo-ms out.")
    if dry_run:
        from ..trtexec_bench import print_lines

        print_lines(opened, chosen, batch, seconds, layers, host_code, output)
        return
    report = None
    if runner == "trtexec":
        from ..trtexec_bench import find_program, time_plans

        if program := find_program(opened, chosen, batch, host_code, output):
            found = time_plans(program, opened, chosen, batch, seconds, layers, output)
            report = Report(opened, runner, *found)
    if report is None:
        opener = _opener(opened, runner, provider, threads, host_code, batch)
        engines = {target: opener(target) for target in chosen}
        runner = "from Python" if runner == "trtexec" else runner
        with tempfile.TemporaryDirectory() as folder:
            others: list[Peer | str] = []
            if peers:
                others = _peers(opened, runner, provider, threads, Path(folder), output)
            on_cpu = (runner, provider) == ("onnx", "cpu")
            report = _timed(
                opened, runner, engines, others, batch, seconds, threads, on_cpu, output
            )
    if slo_ms is not None:
        report = report.steered(slo_ms / 1000, arrivals)
    output.document(report.to_json())
    report.show(output)
    if plot:
        report.draw(plot)
        output.note(f"Wrote {plot}.")


def _opener(
    bundle: Bundle,
    runner: str,
    provider: Provider,
    threads: int | None,
    host_code: bool,
    batches: tuple[int, ...],
) -> Callable[[int], Any]:
    """Target → its engine, which takes those batches."""
    if runner == "onnx":
        from tocom_export.engines.onnx.engine import OnnxEngine

        return lambda target: OnnxEngine(bundle, target, provider=provider, threads=threads)
    from tocom_export.engines.tensorrt.engine import TensorRtEngine
    from tocom_export.engines.tensorrt.plan import check_batches

    def opened(target: int) -> TensorRtEngine:
        engine = TensorRtEngine(bundle.plan(target), host_code=host_code)
        if runner not in (engine.record.library, "trtexec"):
            raise InputError(
                f"--runner {runner}: {bundle.plan(target)} is of {engine.record.library}."
            )
        check_batches(bundle.plan(target), engine.record, batches)
        return engine

    return opened


def _peers(
    bundle: Bundle,
    runner: str,
    provider: Provider,
    threads: int | None,
    folder: Path,
    output: Output,
) -> list[Peer | str]:
    from tocom_export.training.peers import peers

    device = "cpu" if (runner, provider) == ("onnx", "cpu") else "cuda"
    with output.progress("opening", 7) as advance:
        return list(peers(bundle, device, threads, folder, advance))  # type: ignore[arg-type]


def _timed(
    bundle: Bundle,
    runner: str,
    engines: dict[int, Any],
    others: list[Peer | str],
    batches: tuple[int, ...],
    seconds: float,
    threads: int | None,
    on_cpu: bool,
    output: Output,
) -> Report:
    """Engines and peers, batch by batch, taking turns."""
    from tocom_export.engines.bench.report import Report
    from tocom_export.engines.bench.timing import Timing, time_engines
    from tocom_export.engines.verify import sample_images
    from tocom_export.io.memory import memory_of

    peers = [peer for peer in others if not isinstance(peer, str)]
    runs: dict[int | str, Any] = {target: engine.run for target, engine in engines.items()}
    runs |= {peer.name: peer.run for peer in peers}
    found: dict[tuple[int | str, int], Timing] = {}
    memory: dict[str, int | None] = {}
    largest = max(batches)
    with output.progress("timing", (len(batches) + 1) * len(runs)) as advance:
        for batch in batches:
            images = sample_images(bundle.spec, batch)

            def tell(name: int | str, batch: int = batch) -> None:
                advance(f"{_name(name)}, batch {batch}")

            ready = {name: partial(run, images) for name, run in runs.items()}
            timed = time_engines(ready, batch, seconds, tell)
            found |= {(name, batch): timing for name, timing in timed.items()}
        # Beside a GPU it would be the host's part alone.
        for target in engines if on_cpu else ():
            advance(f"{_name(target)}, memory")
            arguments = (bundle.path, target, largest, *((threads,) if threads else ()))
            memory[_name(target)] = memory_of("tocom_export.io.memory", arguments)
        for peer in peers if on_cpu else ():
            advance(f"{peer.name}, memory")
            memory[peer.name] = peer.memory(largest)
    ours = {(n, b): timing for (n, b), timing in found.items() if isinstance(n, int)}
    theirs = {(n, b): timing for (n, b), timing in found.items() if isinstance(n, str)}
    missing = [line for line in others if isinstance(line, str)]
    return Report(bundle, runner, ours, peers=theirs, missing=missing, memory=memory)


def _name(engine: int | str) -> str:
    return f"r{engine:02d}" if isinstance(engine, int) else engine

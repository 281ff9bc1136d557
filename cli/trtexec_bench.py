"""``bench --runner trtexec``: NVIDIA's own tool on a bundle's plans."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tocom_export.engines.tensorrt import trtexec
from tocom_export.engines.tensorrt.plan import check_batches, check_host_code, open_plan
from tocom_export.errors import InputError

from .output import Output

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.bench.timing import Timing

TIMES, PROFILE = "times.json", "profile.json"
"""trtexec's reports."""


def find_program(
    bundle: Bundle,
    targets: tuple[int, ...],
    batches: tuple[int, ...],
    host_code: bool,
    output: Output,
) -> tuple[Path, int] | None:
    """trtexec and its version; None where it is not on the PATH.

    Raises:
        InputError: it can't run the plans.
        PlanError: a plan brings code along that may not run.
    """
    program = trtexec.find()
    if program is None:
        output.note("trtexec is not on the PATH: timed from Python, copies included.")
        return None
    _check_plans(bundle, targets, batches, host_code)
    return program


def _check_plans(
    bundle: Bundle, targets: tuple[int, ...], batches: tuple[int, ...], host_code: bool
) -> None:
    """Raise what :func:`find_program` does for plans that trtexec can't run."""
    for target in targets:
        _, record = open_plan(bundle.plan(target))
        if record.library != "tensorrt":
            raise InputError(
                f"{bundle.plan(target)} is of {record.library}, which trtexec doesn't run; use "
                f"--runner {record.library}."
            )
        if record.stripped:
            raise InputError(f"{bundle.plan(target)} is stripped of its weights; refit it first.")
        check_host_code(bundle.plan(target), record, host_code)
        check_batches(bundle.plan(target), record, batches, least=record.batch[0])


def time_plans(
    program: tuple[Path, int],
    bundle: Bundle,
    targets: tuple[int, ...],
    batches: tuple[int, ...],
    seconds: float,
    layers: bool,
    output: Output,
) -> tuple[dict[tuple[int, int], Timing], dict[int, list[trtexec.LayerTime]]]:
    """Timings, and the profile of each target at the largest batch."""
    path, major = program
    found: dict[tuple[int, int], Timing] = {}
    profiles: dict[int, list[trtexec.LayerTime]] = {}
    with tempfile.TemporaryDirectory() as name:
        steps = _steps(bundle, targets, batches, major, seconds, layers, Path(name))
        with output.progress("trtexec", len(steps)) as advance:
            for (target, batch), line in steps.items():
                advance(f"r{target:02d}, batch {batch}")
                output.detail(shlex.join(line))
                trtexec.run([str(path), *line[1:]])
                found[target, batch] = trtexec.read_times(Path(name, TIMES), batch)
                if layers and batch == max(batches):
                    profiles[target] = trtexec.read_profile(Path(name, PROFILE))
    return found, profiles


def _steps(
    bundle: Bundle,
    targets: tuple[int, ...],
    batches: tuple[int, ...],
    major: int,
    seconds: float,
    layers: bool,
    folder: Path,
) -> dict[tuple[int, int], list[str]]:
    """(target, batch) → trtexec's line, whose reports come into a folder."""
    lines = {}
    for target in targets:
        plan = bundle.plan(target)
        carries = "VERSION_COMPATIBLE" in open_plan(plan)[1].flags
        for batch in batches:
            profile = folder / PROFILE if layers and batch == max(batches) else None
            lines[target, batch] = trtexec.bench_line(
                plan, bundle.spec, batch, major, folder / TIMES, profile, seconds, carries
            )
    return lines


def print_lines(
    bundle: Bundle,
    targets: tuple[int, ...],
    batches: tuple[int, ...],
    seconds: float,
    layers: bool,
    host_code: bool,
    output: Output,
) -> None:
    """What would be typed, for the version on the PATH, else for 10.

    Raises:
        InputError, PlanError: trtexec can't run the plans, as :func:`find_program` says.
    """
    _check_plans(bundle, targets, batches, host_code)
    program = trtexec.find()
    major = program[1] if program else 10
    steps = _steps(bundle, targets, batches, major, seconds, layers, Path())
    lines = [shlex.join(line) for line in steps.values()]
    output.document({"lines": lines})
    if not output.as_json:
        click.echo("\n".join(lines))

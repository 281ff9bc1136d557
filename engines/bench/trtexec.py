"""A bundle's plans timed by NVIDIA's own tool."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import InputError

from ..tensorrt import trtexec
from ..tensorrt.plan import check_batches, check_host_code, open_plan
from .report import Report, Row
from .run import BATCHES, SECONDS, Tell, choose_variants, name_gpu

TIMES, PROFILE = "times.json", "profile.json"
"""trtexec's reports."""


def time_plans(
    bundle: Bundle,
    variants: Iterable[str | int] | None = None,
    *,
    progress: Tell = lambda step: None,
    log: Tell = lambda line: None,
    **options: Any,
) -> Report | None:
    """Time a bundle's plans by trtexec: GPU time, without copies; None where it isn't on the PATH.

    Args:
        progress: called with the variant and the batch before each step.
        log: called with each command line.
        options: of :func:`write_lines`: batch, seconds, host_code, layers.

    Raises:
        DegreeError, InputError, PlanError: as :func:`write_lines`; trtexec fails.
    """
    names = choose_variants(bundle, variants)
    for name in names:
        bundle.plan(name)  # a missing one is told, whether trtexec is there or not
    if not (found := trtexec.find()):
        return None
    (program, major), rows, layers = found, [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = write_lines(bundle, names, folder=folder, major=major, **options)
        for (variant, size), line in lines.items():
            progress(f"{variant}, batch {size}")
            log(shlex.join(line))
            trtexec.run([str(program), *line[1:]])
            timing = trtexec.read_times(folder / TIMES, size)
            rows.append(Row(variant, "trtexec", bundle.precision, variant, timing))
            if f"--exportProfile={folder / PROFILE}" in line:
                layers[variant] = trtexec.read_profile(folder / PROFILE)
    rows.sort(key=lambda row: row.timing.batch)
    return Report(bundle, name_gpu(), rows, layers=layers)


def write_lines(
    bundle: Bundle,
    variants: Iterable[str | int] | None = None,
    *,
    batch: Sequence[int] = BATCHES,
    seconds: float = SECONDS,
    host_code: bool = False,
    layers: bool = False,
    folder: Path = Path(),
    major: int | None = None,
) -> dict[tuple[str, int], list[str]]:
    """(variant, batch) → trtexec's command line.

    Args:
        variants: names or bare degrees; default: all of the bundle.
        batch: numbers of images at a time.
        seconds: for each plan at each batch.
        host_code: let version-compatible plans run the code that they bring along.
        layers: also measure the layers of each plan, at the largest batch.
        folder: for its reports; default: where it is run.
        major: its version; default: of the one on the PATH, else 10.

    Raises:
        DegreeError: the bundle has no such variant, or no plan for it.
        InputError: a plan that trtexec can't run, or a batch that a plan doesn't take.
        PlanError: a plan is damaged, or brings code along that may not run.
    """
    if major is None:
        found = trtexec.find()
        major = found[1] if found else 10
    lines = {}
    for variant in choose_variants(bundle, variants):
        plan = bundle.plan(variant)
        carries_code = _check_plan(plan, batch, host_code)
        for size in batch:
            profile = folder / PROFILE if layers and size == max(batch) else None
            lines[variant, size] = trtexec.bench_line(
                plan, bundle.spec, size, major, folder / TIMES, profile, seconds, carries_code
            )
    return lines


def _check_plan(plan: Path, batch: Iterable[int], host_code: bool) -> bool:
    """Raise where trtexec can't run a plan; whether the plan brings code along."""
    _, record = open_plan(plan)
    if record.backend != "tensorrt":
        raise InputError(
            f"{plan} is of {record.backend}, which trtexec doesn't run; choose `backend` "
            f"{record.backend}."
        )
    if record.refit == "identical":
        raise InputError(
            f"{plan} takes its weights from its bundle when it is opened, and trtexec opens it by "
            "itself; choose `backend` tensorrt."
        )
    if record.stripped:
        raise InputError(f"{plan} is stripped of its weights; refit it first.")
    check_host_code(plan, record, host_code)
    check_batches(plan, record, batch, least=record.batch[0])
    return "VERSION_COMPATIBLE" in record.flags

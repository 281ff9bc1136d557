"""NVIDIA's trtexec: its command lines, and what it reports."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tocom_export.errors import InputError, PlanError, brief
from tocom_export.model.spec import VitSpec

from ..bench.timing import Timing, summarise_times
from .plan import Batch

WARM_UP = 500
"""Milliseconds; what ran before is in the report, too, and left out."""


@dataclass(frozen=True)
class LayerTime:
    """One layer of a plan, as the builder fused it."""

    name: str
    average_ms: float
    share: float
    """Of the plan's time, percent."""


def bench_line(
    plan: Path,
    spec: VitSpec,
    batch: int,
    major: int,
    times: Path,
    profile: Path | None = None,
    seconds: float = 3,
    host_code: bool = False,
) -> list[str]:
    """The line that times a plan.

    Args:
        major: trtexec's version; 11 records CUDA graphs, waits by spinning and leaves copies out
            by itself, 10 is told to.
        times: file for the time of each run.
        profile: file for the time of each layer, which a second run measures.
        host_code: let a version-compatible plan run the code that it brings along.
    """
    line = ["trtexec", f"--loadEngine={plan}", f"--shapes={_format_shape(spec, batch)}"]
    if host_code:
        line.append("--versionCompatible")
    if major < 11:
        line += ["--noDataTransfers", "--useCudaGraph", "--useSpinWait"]
    line += [f"--warmUp={WARM_UP}", f"--duration={seconds:g}", f"--exportTimes={times}"]
    if profile:
        line += ["--separateProfileRun", f"--exportProfile={profile}"]
    return line


def build_line(
    graph: Path,
    plan: Path,
    spec: VitSpec,
    batch: Batch,
    major: int,
    *,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    identical: bool = False,
) -> list[str]:
    """The line that builds a graph as it is; a plan of trtexec's can't be refitted by us.

    Args:
        identical: without its weights, and with ``REFIT_IDENTICAL``, which trtexec takes that for.
    """
    line = ["trtexec", f"--onnx={graph}", f"--saveEngine={plan}"]
    names = ("minShapes", "optShapes", "maxShapes")
    line += [f"--{name}={_format_shape(spec, n)}" for name, n in zip(names, batch, strict=True)]
    if major < 11:
        line.append("--stronglyTyped")
    if version_compatible:
        line.append("--versionCompatible")
    if hardware_compatible:
        line.append("--hardwareCompatibilityLevel=ampere+")
    if identical:
        line.append("--stripWeights")
    return [*line, "--noTF32", "--profilingVerbosity=detailed", "--skipInference"]


def _format_shape(spec: VitSpec, batch: int) -> str:
    return "images:" + "x".join(map(str, (batch, spec.channels, *spec.image_size)))


def find() -> tuple[Path, int] | None:
    """trtexec on the PATH and its major version; None where there is none."""
    if not (found := shutil.which("trtexec")):
        return None
    try:
        said = subprocess.run([found, "--help"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    number = re.search(r"TensorRT v(\d+)", said.stdout + said.stderr)
    digits = number[1] if number else "100000"  # v101303 is 10.13.3, v8601 is 8.6.1
    return Path(found), int(digits[: 2 if len(digits) > 4 else 1])


def run(line: list[str]) -> None:
    """Run a line; raise PlanError with what trtexec said where it fails."""
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        said = next((x for x in lines if "[E]" in x), "")  # what follows comes of the first
        said = re.sub(r"^.*\[E\]\s*", "", said) or f"exit status {done.returncode}"
        raise PlanError(f"{' '.join(line)}: {said[:200]}")


def read_times(file: Path, batch: int) -> Timing:
    """What ``--exportTimes`` wrote: GPU time without copies; images a second from the runs' pace.

    Raises:
        InputError: the file is not of that form, or holds no run.
    """
    found = _read(file, "report", "computeMs", "startComputeMs", "endComputeMs")
    took, began, ended = np.reshape([e for e in found if e[1] >= WARM_UP], (-1, 3)).T
    if not len(took):
        raise InputError(f"{file} holds no run after {WARM_UP} ms of warm-up.")
    seconds = max(ended.max() - began.min(), 1e-6) / 1000
    pace = float(batch * len(took) / seconds)
    return dataclasses.replace(summarise_times(took / 1000, batch), images_per_s=pace)


def read_profile(file: Path) -> list[LayerTime]:
    """What ``--exportProfile`` wrote, the slowest layer first; errors as of :func:`read_times`."""
    layers = [LayerTime(*e) for e in _read(file, "profile", "name", "averageMs", "percentage")]
    return sorted(layers, key=lambda layer: -layer.average_ms)


def _read(file: Path, what: str, *keys: str) -> list[list[Any]]:
    """Of each entry of a report, these values."""
    try:
        return [
            [entry[key] if key == "name" else float(entry[key]) for key in keys]
            for entry in json.loads(file.read_text("utf-8"))
            if "count" not in entry  # a profile begins with the number of runs
        ]
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no {what} of trtexec's ({brief(error)}).") from None

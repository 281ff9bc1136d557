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

from ..bench.timing import Timing, summary
from .plan import Batch

WARM_UP = 500
"""Milliseconds; what ran before is in the report, too, and left out."""
DURATION = 3
"""Seconds."""


@dataclass(frozen=True)
class LayerTime:
    """One layer of a plan, as the builder fused it."""

    name: str
    average_ms: float
    share: float
    """Of the plan's time, percent."""


def shape_of(spec: VitSpec, batch: int) -> str:
    """trtexec's form of the input's shape."""
    return "images:" + "x".join(map(str, (batch, spec.channels, *spec.image_size)))


def bench_line(
    plan: Path,
    spec: VitSpec,
    batch: int,
    major: int,
    times: Path,
    profile: Path | None = None,
    seconds: float = DURATION,
    host_code: bool = False,
) -> list[str]:
    """The line that times a plan.

    Version 11 records CUDA graphs, waits by spinning and leaves copies out by itself; 10 is told
    to, so that the two can be compared.

    Args:
        major: trtexec's version, 10 or 11.
        times: file for the time of each run.
        profile: file for the time of each layer, which a second run measures.
        host_code: let a version-compatible plan run the code that it brings along; without,
            trtexec doesn't open it.
    """
    line = ["trtexec", f"--loadEngine={plan}", f"--shapes={shape_of(spec, batch)}"]
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
) -> list[str]:
    """The line that builds a graph as it is; a plan of trtexec's can't be refitted by us."""
    line = ["trtexec", f"--onnx={graph}", f"--saveEngine={plan}"]
    names = ("minShapes", "optShapes", "maxShapes")
    line += [f"--{name}={shape_of(spec, n)}" for name, n in zip(names, batch, strict=True)]
    if major < 11:
        line.append("--stronglyTyped")
    if version_compatible:
        line.append("--versionCompatible")
    if hardware_compatible:
        line.append("--hardwareCompatibilityLevel=ampere+")
    return [*line, "--noTF32", "--profilingVerbosity=detailed", "--skipInference"]


def find() -> tuple[Path, int] | None:
    """trtexec on the PATH and its major version; None where there is none."""
    found = shutil.which("trtexec")
    if not found:
        return None
    try:
        said = subprocess.run([found, "--help"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    number = re.search(r"TensorRT v(\d+)", said.stdout + said.stderr)
    if not number:
        return Path(found), 10
    digits = number[1]  # v101303 is 10.13.3, v8601 is 8.6.1
    return Path(found), int(digits[:2]) if len(digits) >= 5 else int(digits[0])


def run(line: list[str]) -> None:
    """Run a line.

    Raises:
        PlanError: it fails; with what trtexec said.
    """
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        said = next((x for x in lines if "[E]" in x), "")  # what follows comes of the first
        said = re.sub(r"^.*\[E\]\s*", "", said) or f"exit status {done.returncode}"
        raise PlanError(f"{' '.join(line)}: {said[:200]}")


def read_times(file: Path, batch: int) -> Timing:
    """What ``--exportTimes`` wrote, runs of the warm-up left out: GPU time, without copies.

    The throughput is the pace at which runs followed each other.

    Raises:
        InputError: the file is not of that form, or holds no run.
    """
    try:
        entries = [e for e in _load(file) if e["startComputeMs"] >= WARM_UP]
        times = np.array([float(e["computeMs"]) for e in entries])
        began = [float(e["startComputeMs"]) for e in entries]
        ended = [float(e["endComputeMs"]) for e in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no report of trtexec's ({brief(error)}).") from None
    if not entries:
        raise InputError(f"{file} holds no run after {WARM_UP} ms of warm-up.")
    seconds = max(max(ended) - min(began), 1e-6) / 1000
    pace = batch * len(entries) / seconds
    return dataclasses.replace(summary(times / 1000, batch), throughput=pace)


def read_profile(file: Path) -> list[LayerTime]:
    """What ``--exportProfile`` wrote, the slowest layer first.

    Raises:
        InputError: the file is not of that form.
    """
    try:
        layers = [
            LayerTime(str(e["name"]), float(e["averageMs"]), float(e["percentage"]))
            for e in _load(file)
            if "name" in e  # the first entry counts the runs
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no profile of trtexec's ({brief(error)}).") from None
    return sorted(layers, key=lambda layer: -layer.average_ms)


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}.") from None

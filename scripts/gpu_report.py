"""What ``gpu_check.py`` tells: the steps, the figures, the machine, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tocom_export.engines.bench.timing import time_engines
from tocom_export.engines.tensorrt.cuda import find_gpu
from tocom_export.errors import MissingPackageError

DENSE, TORCH = "r00", "torch eager"
"""What speed-ups are over: the variant that removes nothing, and this backend."""
FORM = ", refit "
"""Between a library and a form of its plans: ``tensorrt, refit qkv``."""
HOST, GPU = "host to host", "on the GPU"
"""What a time is of: both copies included, or none."""
Key = tuple[str, str, str]
"""Backend, variant, and one of these two."""
Runs = Mapping[Key, Callable[[], object]]
"""What is timed: one run of a batch."""
PACKAGES = ("torch", "timm", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx_cu13", "cuda-python")


class Skip(Exception):
    """Something is not installed, or there is no GPU, or no time."""


class Report:
    """What was checked and measured so far."""

    def __init__(self, minutes: float) -> None:
        self.ends = time.monotonic() + 60 * minutes
        self.steps: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []

    def need(self, seconds: float) -> None:
        """Raise Skip where a step would not end in time."""
        if time.monotonic() + seconds > self.ends:
            raise Skip("no time left")

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """One step: what it puts into the dictionary is kept; its errors end the step alone."""
        entry: dict[str, Any] = {"step": name, "status": "ok"}
        began = time.monotonic()
        try:
            yield entry
        except (Skip, MissingPackageError) as reason:
            entry |= {"status": "skipped", "why": str(reason)}
        except Exception as error:  # a broken library must not hide what the others can do
            entry |= {"status": "failed", "why": f"{type(error).__name__}: {error}"[:500]}
        entry["seconds"] = round(time.monotonic() - began, 2)
        self.steps.append(entry)
        print(
            f"{entry['status']:8} {name} ({entry['seconds']} s) {entry.get('why', '')}", flush=True
        )

    def measure(self, name: str, runs: Runs, batch: int, seconds: float) -> None:
        """Time runs of one batch in turns, each for so many seconds, and keep the figures."""
        with self.step(f"{name}, batch {batch}: timed"):
            self.need(seconds * len(runs))
            if not runs:
                raise Skip("nothing to time")
            for (backend, variant, copies), timing in time_engines(runs, batch, seconds).items():
                self.figures.append(
                    {"backend": backend, "variant": variant, "timed": copies}
                    | dataclasses.asdict(timing)
                )

    @property
    def failed(self) -> bool:
        """Whether a step did."""
        return any(entry["status"] == "failed" for entry in self.steps)

    def document(self) -> dict[str, Any]:
        """The JSON."""
        return {"machine": describe_machine(), "steps": self.steps, "figures": self.figures}

    def save(self, folder: Path) -> None:
        """Write what there is so far, should the machine go."""
        document = self.document()
        (folder / "gpu_check.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")
        (folder / "gpu_check.md").write_text(format_markdown(document), "utf-8")


def describe_machine() -> dict[str, Any]:
    """GPU, system and versions."""
    facts: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    try:
        gpu = find_gpu()
        facts["gpu"] = dataclasses.asdict(gpu) if gpu else None
    except Exception as error:  # cuda-python is missing, or its driver is
        facts["gpu"] = f"{type(error).__name__}: {error}"
    return facts


def format_markdown(document: dict[str, Any]) -> str:
    """A table of the steps, and one of the figures."""
    facts = ", ".join(f"{k} {v}" for k, v in document["machine"].items() if v)
    lines = [facts, "", "| step | | |", "|---|---|---|"]
    for entry in document["steps"]:
        rest = {k: v for k, v in entry.items() if k not in ("step", "status")}
        told = "; ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items()
        )
        lines.append(f"| {entry['step']} | {entry['status']} | {told.replace('|', '/')} |")
    lines += [
        "",
        f"| backend | timed | batch | variant | median ms | images/s | over {DENSE} "
        f"| over {TORCH} |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    pace = {
        (f["backend"], f["timed"], f["batch"], f["variant"]): f["images_per_s"]
        for f in document["figures"]
    }
    for f in document["figures"]:
        backend, timed, batch, variant = (f[k] for k in ("backend", "timed", "batch", "variant"))
        # Like over like: the same copies, the same batch.
        bases = [(backend, timed, batch, DENSE), (TORCH, timed, batch, variant)]
        dense, torch = (f"{f['images_per_s'] / pace[b]:.2f}×" if b in pace else "-" for b in bases)
        lines.append(
            f"| {backend} | {timed} | {batch} | {variant} | {f['median_ms']:.2f} "
            f"| {f['images_per_s']:.0f} | {dense} | {torch} |"
        )
    return "\n".join([*lines, *format_forms(document["figures"])]) + "\n"


def format_forms(figures: list[dict[str, Any]]) -> list[str]:
    """A table of the forms of plans alone, one beside the other: median milliseconds."""
    rows: dict[tuple[Any, ...], dict[str, float]] = {}
    for f in figures:
        library, _, form = f["backend"].partition(FORM)
        if form:
            row = rows.setdefault((library, f["timed"], f["batch"], f["variant"]), {})
            row[form] = f["median_ms"]
    if not rows:
        return []
    forms = list(dict.fromkeys(form for row in rows.values() for form in row))
    columns = ["backend", "timed", "batch", "variant", *(f"refit {form}, ms" for form in forms)]
    lines = ["", f"| {' | '.join(columns)} |", "|---|---|---:|---|" + "---:|" * len(forms)]
    for key, row in rows.items():
        cells = [*map(str, key), *(f"{row[form]:.3f}" if form in row else "-" for form in forms)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines

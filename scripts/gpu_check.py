"""Everything that needs an NVIDIA GPU, in under eight minutes: one JSON, one Markdown table.

python scripts/gpu_check.py [--out DIR] [--model NAME] [--minutes 8]

The package must be importable. Whatever of tensorrt, tensorrt_rtx, onnxruntime-gpu and torch is
installed is checked: plans are built in fp16, run, refitted there and back, stripped and refitted,
each compared with PyTorch, and timed at r = 0, 4, 8, 12, 16 beside torch: from float32 images on
the host to logits on the host, and on what lies on the GPU already. What isn't installed is skipped
by name, and what no time is left for, too. Exit status 1 where a check failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import BuildPlan, write_bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import ModelInfo
from tocom_export.compression.method import Method
from tocom_export.engines.bench.timing import time_engines
from tocom_export.engines.onnx.engine import OnnxEngine
from tocom_export.engines.refit import NewWeights, refit_plan
from tocom_export.engines.tensorrt.building import PlanOptions, build_plan
from tocom_export.engines.tensorrt.cuda import find_gpu
from tocom_export.engines.tensorrt.engine import TensorRtEngine
from tocom_export.engines.tensorrt.library import LIBRARIES, Library, Nvidia, open_library
from tocom_export.engines.tensorrt.plan import save_plan
from tocom_export.engines.verify import compare_engine, sample_images
from tocom_export.errors import MissingPackageError
from tocom_export.model.catalogue import known_model
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.spec import VitSpec

TARGETS, BATCHES, SOURCE, SCALE = (0, 4, 8, 12, 16), (1, 8, 32, 128), 0, 0.1
PLAN_BATCHES = (1, 32, max(BATCHES))
TORCH = "torch eager"
HOST, GPU = "host to host", "on the GPU"
"""What a time is of: both copies included, or none."""
Key = tuple[str, int, str]
"""Engine, degree, and one of these two."""
PACKAGES = ("torch", "timm", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx_cu13", "cuda-python")


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

    def document(self) -> dict[str, Any]:
        """The JSON."""
        return {"machine": machine(), "steps": self.steps, "figures": self.figures}


class Skip(Exception):
    """Something is not installed, or there is no GPU."""


def machine() -> dict[str, Any]:
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


def random_model(spec: VitSpec) -> tuple[Checkpoint, ToComBank]:
    """Weights and a bank in which no two tensors are alike."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in spec.weights().items():
        values = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            values *= np.float32(0.5 if "token" in name or "pos" in name else shape[-1] ** -0.5)
        else:
            values = values * np.float32(0.1) + np.float32(name.endswith((".weight", "gamma")))
        tensors[name] = values.astype(np.float32)
    down, up = (spec.depth, 16, 2, spec.width), (spec.depth, 16, spec.width, 2)
    factors = [(rng.standard_normal(s) * 0.05).astype(np.float32) for s in (down, up) * 2]
    bank = ToComBank(*factors, method=Method("tome"), model=spec.model)
    return Checkpoint(Path("random"), tensors, ModelInfo()), bank


def build(spec: VitSpec, precision: Any, folder: Path) -> tuple[Bundle, BuildPlan]:
    """A bundle of all targets."""
    checkpoint, bank = random_model(spec)
    plan = BuildPlan(
        spec, checkpoint, bank, Method("tome"), SOURCE, TARGETS, SCALE, Preprocess(),
        precision=precision,
    )  # fmt: skip
    return write_bundle(plan, folder / precision), plan


class Plans:
    """A library's plans of all targets."""

    def __init__(self, nvidia: Nvidia, folder: Path) -> None:
        self.nvidia, self.folder = nvidia, folder
        self.engines: dict[int, TensorRtEngine] = {}
        self.built: dict[int, float] = {}
        """Target → seconds."""

    def runs(self, images: Any) -> dict[Key, Callable[[], object]]:
        """What is timed of a batch."""
        label = self.nvidia.library
        runs: dict[Key, Callable[[], object]] = {}
        for target, engine in self.engines.items():
            runs[label, target, HOST] = partial(engine.run, images)
            runs[label, target, GPU] = partial(engine.run_again, len(images))
        return runs


def build_plans(library: Library, bundle: Bundle, report: Report) -> Plans | None:
    """Build every target, and compare it with PyTorch; None where the library can't be used."""
    with report.step(f"{library}: installed, and a GPU") as entry:
        nvidia = open_library(library)
        entry["version"] = nvidia.version
        if find_gpu() is None:
            raise Skip("no GPU that CUDA can use")
    if entry["status"] != "ok":
        return None
    plans = Plans(nvidia, bundle.path / library)
    plans.folder.mkdir()
    options = PlanOptions(batch=PLAN_BATCHES, timing_cache=plans.folder / "timings")
    for target in TARGETS:
        with report.step(f"{library}: r{target:02d} built in fp16, compared with PyTorch") as e:
            report.need(60)
            began = time.monotonic()
            file = plans.folder / f"r{target:02d}.plan"
            save_plan(file, *build_plan(nvidia, bundle, target, options))
            plans.built[target] = e["build_seconds"] = time.monotonic() - began
            engine = TensorRtEngine(file)
            e |= judge(engine.run, bundle, target, sample_images(bundle.spec, 32))
            plans.engines[target] = engine
    return plans


def check_plans(plans: Plans, bundle: Bundle, plan: BuildPlan, report: Report) -> None:
    """Refit there and back, strip, and build in fp32."""
    nvidia, library, engines = plans.nvidia, plans.nvidia.library, plans.engines
    images = sample_images(bundle.spec, 32)
    options = PlanOptions(batch=PLAN_BATCHES, timing_cache=plans.folder / "timings")
    target = 8
    file, moved = plans.folder / "r08.plan", plans.folder / "moved.plan"
    with report.step(f"{library}: r08 refitted there and back") as e:
        report.need(10)
        if target not in engines:
            raise Skip("it was not built")
        engine = engines[target]
        first = engine.run(images)
        there = NewWeights(plan.checkpoint, plan.bank, 16, 0.05).at(bundle.spec, 8, "fp16")
        back = bundle.tensors(target)
        began = time.monotonic()
        engine.refit({name: there[name] for name in engine.record.refittable})
        e["refit_seconds"] = time.monotonic() - began
        e["building_over_refitting"] = plans.built[target] / e["refit_seconds"]
        if np.array_equal(engine.run(images), first):
            raise AssertionError("a refit changed nothing")
        engine.refit({name: back[name] for name in engine.record.refittable})
        if not np.array_equal(engine.run(images), first):
            raise AssertionError("A, B, A does not give the outputs of A")
    with report.step(f"{library}: r08 refitted and saved, twice, against a new build") as e:
        report.need(90)
        refit_plan(file, NewWeights(plan.checkpoint, plan.bank, 4, SCALE), moved)
        refit_plan(moved, NewWeights(plan.checkpoint, plan.bank, 16, SCALE), moved)
        other = write_bundle(dataclasses.replace(plan, source=16), plans.folder / "other")
        fresh = other.path / "r08.plan"
        save_plan(fresh, *build_plan(nvidia, other, 8, options))
        found, wanted = (TensorRtEngine(name).run(images) for name in (moved, fresh))
        differs = np.abs(found - wanted).max(axis=1) / np.abs(wanted).max()
        e["median_relative_difference"] = float(np.median(differs))
        e["largest_relative_difference"] = float(differs.max())
        if e["median_relative_difference"] > 1e-3:  # two builds may round, and merge, otherwise
            raise AssertionError(f"half of the images differ by more than {np.median(differs):.1e}")
    with report.step(f"{library}: r08 stripped and refitted") as e:
        report.need(60)
        bare = plans.folder / "bare.plan"
        save_plan(bare, *build_plan(nvidia, bundle, 8, dataclasses.replace(options, strip=True)))
        e["bytes_stripped"], e["bytes_whole"] = bare.stat().st_size, file.stat().st_size
        refit_plan(bare, NewWeights(plan.checkpoint, plan.bank, SOURCE, SCALE), bare)
        e |= judge(TensorRtEngine(bare).run, bundle, 8, images)
    with report.step(f"{library}: r16 in fp32, compared with PyTorch") as e:
        report.need(60)
        exact = write_bundle(
            dataclasses.replace(plan, precision="fp32", targets=(16,)), plans.folder / "fp32"
        )
        save_plan(exact.path / "r16.plan", *build_plan(nvidia, exact, 16, options))
        e |= judge(TensorRtEngine(exact.path / "r16.plan").run, exact, 16, images)


def judge(run: Callable[..., Any], bundle: Bundle, target: int, images: Any) -> dict[str, Any]:
    """An engine against PyTorch on the CPU.

    Raises:
        AssertionError: it says something else.
    """
    if importlib.util.find_spec("timm") is None:
        return {"compared": "timm is not installed"}
    from tocom_export.training.torch_engine import Reference

    reference = Reference(bundle)
    found = compare_engine(
        run, target, bundle.precision, images, lambda x: reference(target, x), batch=len(images)
    )
    if not found.passed:
        raise AssertionError(
            f"{found.beyond} of {found.images} images differ, by {found.max_difference:.1e} at most"
        )
    return {"max_difference": found.max_difference, "images_beyond": found.beyond}


def torch_runs(
    bundle: Bundle, plan: BuildPlan, batch: int, device: str, compiled: bool = False
) -> dict[Key, Callable[[], object]]:
    """One run of a batch in half precision, waiting for its end."""
    import torch

    from tocom_export.training.scatter_merge import UsualVit
    from tocom_export.training.torch_engine import load_model

    images = torch.from_numpy(sample_images(bundle.spec, batch))
    if device == "cuda":
        images = images.pin_memory()  # as TensorRT's buffers on the host are
    resident = images.to(device).half()
    model = load_model(bundle.spec, plan.checkpoint.tensors, plan.method).to(device).half()
    models: dict[str, Any] = {
        TORCH: model,
        "torch, usual merging": UsualVit(model.vit, plan.method, bundle.spec.model).eval(),
    }
    if compiled:
        torch.compiler.reset()
        models = {"torch.compile": torch.compile(model)}

    @torch.inference_mode()
    def run(network: Any, target: int, copies: str) -> Any:
        given = images.to(device, non_blocking=True).half() if copies == HOST else resident
        logits = network(given, target)
        if copies == HOST:
            return logits.float().cpu()
        if device == "cuda":
            torch.cuda.synchronize()
        return None

    return {
        (name, target, copies): partial(run, network, target, copies)
        for target in TARGETS
        for copies in (HOST, GPU)
        for name, network in models.items()
    }


def need_torch() -> None:
    """Raise Skip where PyTorch can't be timed."""
    if not all(map(importlib.util.find_spec, ("torch", "timm"))):
        raise Skip("torch or timm is not installed")
    import torch

    if not torch.cuda.is_available():
        raise Skip("torch has no GPU")


def onnx_engines(bundle: Bundle, report: Report) -> dict[int, OnnxEngine]:
    """ONNX Runtime's CUDA provider, compared with PyTorch."""
    engines: dict[int, OnnxEngine] = {}
    for target in TARGETS:
        with report.step(f"onnxruntime, CUDA: r{target:02d} compared with PyTorch") as entry:
            report.need(5)
            if importlib.util.find_spec("onnxruntime") is None:
                raise Skip("onnxruntime is not installed")
            import onnxruntime

            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise Skip("this ONNX Runtime has no CUDA; onnxruntime-gpu has")
            engine = OnnxEngine(bundle, target, provider="cuda")
            entry |= judge(engine.run, bundle, target, sample_images(bundle.spec, 32))
            engines[target] = engine
    return engines


def measure(
    name: str,
    runs: dict[Key, Callable[[], object]],
    batch: int,
    report: Report,
    seconds: float,
) -> None:
    """Time runs of one batch, and keep the figures."""
    with report.step(f"{name}, batch {batch}: timed"):
        report.need(seconds * len(runs))
        if not runs:
            raise Skip("nothing to time")
        for (label, target, copies), timing in time_engines(runs, batch, seconds).items():
            report.figures.append(
                {"engine": label, "target": target, "timed": copies, **timing.to_json()}
            )


def markdown(document: dict[str, Any]) -> str:
    """The table."""
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
        f"| engine | timed | batch | r | median ms | images/s | over r = 0 | over {TORCH} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    pace = {
        (f["engine"], f["timed"], f["batch"], f["target"]): f["throughput"]
        for f in document["figures"]
    }
    for f in document["figures"]:
        engine, timed, batch, target = (f[k] for k in ("engine", "timed", "batch", "target"))
        # Like over like: the same copies, the same batch.
        bases = [(engine, timed, batch, 0), (TORCH, timed, batch, target)]
        whole, torch = (f"{f['throughput'] / pace[b]:.2f}×" if b in pace else "-" for b in bases)
        lines.append(
            f"| {engine} | {timed} | {batch} | {target} | {f['median_ms']:.2f} "
            f"| {f['throughput']:.0f} | {whole} | {torch} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit status 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each engine and batch")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.minutes)
    spec, _ = known_model(options.model)

    def save() -> None:  # after each part: what was measured stays, should the machine go
        document = report.document()
        (options.out / "gpu_check.json").write_text(json.dumps(document, indent=2) + "\n")
        (options.out / "gpu_check.md").write_text(markdown(document))

    with tempfile.TemporaryDirectory() as name:
        bundle, plan = build(spec, "fp16", Path(name))
        # Each is timed as soon as it is there: the many builds must not take the time of that.
        for batch in reversed(BATCHES):
            with report.step(f"torch, batch {batch}"):
                need_torch()
                peers = torch_runs(bundle, plan, batch, "cuda")
                measure("torch", peers, batch, report, options.seconds)
        save()
        onnx = onnx_engines(bundle, report)
        for batch in reversed(BATCHES):
            images = sample_images(spec, batch)
            runs: dict[Key, Callable[[], object]] = {
                ("onnxruntime", t, HOST): partial(engine.run, images) for t, engine in onnx.items()
            }
            measure("onnxruntime", runs, batch, report, options.seconds)
        save()
        usable: list[Plans] = []
        for library in LIBRARIES:
            plans = build_plans(library, bundle, report)
            for batch in reversed(BATCHES):
                runs = plans.runs(sample_images(spec, batch)) if plans else {}
                measure(library, runs, batch, report, options.seconds)
            usable += [plans] if plans else []
            save()
        for plans in usable:
            check_plans(plans, bundle, plan, report)
            save()
        for batch in reversed(BATCHES):  # last, since each compilation takes half a minute
            for target in TARGETS[::-1]:
                with report.step(f"torch.compile, r{target:02d}, batch {batch}"):
                    need_torch()
                    report.need(45)
                    peers = torch_runs(bundle, plan, batch, "cuda", compiled=True)
                    peers = {key: run for key, run in peers.items() if key[1] == target}
                    measure("compiled", peers, batch, report, options.seconds)
            save()
    return int(any(entry["status"] == "failed" for entry in report.steps))


if __name__ == "__main__":
    sys.exit(main())

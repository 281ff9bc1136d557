"""From a bundle's graph to a TensorRT plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tocom_export.atomic import replaced
from tocom_export.bundle import Bundle
from tocom_export.engines.cuda import find_gpu, why_no_gpu
from tocom_export.engines.nvidia import Nvidia
from tocom_export.engines.plan import (
    Batch,
    PlanRecord,
    Refit,
    Tensor,
    fixed_digest,
    refittable_names,
)
from tocom_export.engines.refitter import open_engine, open_refitter
from tocom_export.errors import OutputError, PlanError

Progress = Callable[[str, int, int], None]
"""Phase, steps done, steps in all."""


@dataclass(frozen=True)
class PlanOptions:
    """How plans are built."""

    refit: Refit = "qkv"
    strip: bool = False
    batch: Batch = (1, 8, 32)
    version_compatible: bool = False
    """Runs with later versions of the library, too."""
    hardware_compatible: bool = False
    """Runs on any GPU of the Ampere generation or later, some slower."""
    timing_cache: Path | None = None
    """What was measured in earlier builds; read and written."""


def build_plan(
    nvidia: Nvidia,
    bundle: Bundle,
    target: int,
    options: PlanOptions,
    progress: Progress | None = None,
) -> tuple[bytes, PlanRecord]:
    """Parse a target's graph and let the library build it.

    The caller runs the plan before it relies on it.

    Strongly typed: the types are the graph's. Of the refit flags only ``REFIT_INDIVIDUAL`` is
    ever set, with exactly the weights marked that a refit needs; ``REFIT_IDENTICAL``, which
    ``STRIP_PLAN`` alone implies, is undefined for other weights.

    Raises:
        PlanError: the library can't parse or build it.
        DegreeError: the bundle has no such target.
    """
    trt, graph = nvidia.trt, bundle.graph(target)
    gpu = find_gpu()
    if gpu is None and (options.refit != "none" or nvidia.library == "tensorrt"):
        raise PlanError(
            f"--engine {nvidia.library}: no GPU that CUDA can use ({why_no_gpu()}). "
            + (
                "TensorRT-RTX builds ahead of time for other machines, with --refit none."
                if nvidia.library == "tensorrt-rtx"
                else "TensorRT builds on the machine that the plan will run on."
            )
        )
    builder = trt.Builder(nvidia.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, nvidia.logger)
    if not parser.parse_from_file(str(graph)):
        said = parser.get_error(0).desc() if parser.num_errors else nvidia.reason("no reason given")
        raise PlanError(f"{graph}: {nvidia.library}'s parser refuses it ({said[:200]}).")
    stored = bundle.tensors(target)
    names = refittable_names(bundle, list(stored), options.refit)
    if unknown := [name for name in names if not network.mark_weights_refittable(name)]:
        raise PlanError(f"{graph}: {nvidia.library} can't refit {unknown[0]}; please report this.")
    config, flags = builder.create_builder_config(), []
    # TF32, on unless it is cleared, rounds what goes into a float32 product to fp16's digits.
    config.clear_flag(trt.BuilderFlag.TF32)
    wanted = {
        "REFIT_INDIVIDUAL": bool(names),
        "STRIP_PLAN": options.strip,
        "VERSION_COMPATIBLE": options.version_compatible,
    }
    for name in (name for name, on in wanted.items() if on):
        if not hasattr(trt.BuilderFlag, name):
            raise PlanError(f"{nvidia.library} {nvidia.version} has no {name}; a later one has.")
        config.set_flag(getattr(trt.BuilderFlag, name))
        flags.append(name)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        flags.append("AMPERE_PLUS")
    profile = builder.create_optimization_profile()
    image = (bundle.spec.channels, *bundle.spec.image_size)
    profile.set_shape("images", *((count, *image) for count in options.batch))
    config.add_optimization_profile(profile)
    monitor = _monitor(trt, progress) if progress else None
    if monitor:
        config.progress_monitor = monitor
    # TensorRT-RTX has none: it chooses kernels on the machine that it runs on.
    file = options.timing_cache if nvidia.library == "tensorrt" else None
    cache = _read_cache(config, file) if file else None
    plan = builder.build_serialized_network(network, config)
    if plan is None and monitor and monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise PlanError(f"{graph}: {nvidia.library} can't build it ({nvidia.reason('no reason')}).")
    if cache is not None and file:
        with suppress(OutputError), replaced(file) as beside:
            beside.write_bytes(bytes(config.get_timing_cache().serialize()))
    content = bytes(plan)
    if names:
        names = _kept(nvidia, content, names, options)
    return content, PlanRecord(
        target=target,
        source=bundle.source,
        scale=bundle.scale,
        compensated=bundle.compensated and target != bundle.source,
        spec=bundle.spec,
        method=bundle.method,
        precision=bundle.precision,
        refit=options.refit,
        stripped=options.strip,
        batch=options.batch,
        refittable={name: Tensor(stored[name].shape, stored[name].dtype.name) for name in names},
        fixed=fixed_digest(stored, names),
        library=nvidia.library,
        version=nvidia.version,
        compute_capability=gpu.capability if gpu else None,
        gpu=gpu.name if gpu else None,
        flags=tuple(flags),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _kept(nvidia: Nvidia, content: bytes, marked: list[str], options: PlanOptions) -> list[str]:
    """Of the marked weights, those that the plan can exchange: some may have been folded.

    Raises:
        PlanError: one that ToCom needs is not among them.
    """
    engine = open_engine(nvidia, content, options.version_compatible)  # the code is our own
    asked = set(open_refitter(nvidia, engine).get_all_weights())
    kept = [name for name in marked if name in asked]
    if options.refit == "qkv" and len(kept) < len(marked):
        lost = next(name for name in marked if name not in asked)
        raise PlanError(f"{nvidia.library} built a plan that can't exchange {lost}; report this.")
    return kept


def _read_cache(config: Any, file: Path) -> Any:
    """The timing cache in a file, or a new one; one of another device or version is not used."""
    content = b""
    with suppress(OSError):
        content = file.read_bytes()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _monitor(trt: Any, progress: Progress) -> Any:
    """An ``IProgressMonitor`` that tells how far the outermost phase is, and stops on Ctrl-C."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if phase in self._steps:
                    progress(phase, step + 1, self._steps[phase])
            except KeyboardInterrupt:  # an exception can't pass through the library
                self.interrupted = True
                return False
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()

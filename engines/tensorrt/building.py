"""From a bundle's graph to a TensorRT plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import OutputError, PlanError
from tocom_export.io.atomic import replaced

from .cuda import Gpu, find_gpu, why_no_gpu
from .interrupt import deferred_interrupt
from .library import Library, Nvidia
from .plan import (
    Batch,
    PlanRecord,
    Refit,
    Tensor,
    fixed_digest,
    refittable_names,
)
from .refitter import open_engine, open_refitter

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
        KeyboardInterrupt: Ctrl-C, once the library has stopped.
    """
    trt, graph = nvidia.trt, bundle.graph(target)
    gpu = check_can_build(nvidia, options)
    builder = trt.Builder(nvidia.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, nvidia.logger)
    with deferred_interrupt():
        parsed = parser.parse_from_file(str(graph))
    if not parsed:
        said = parser.get_error(0).desc() if parser.num_errors else nvidia.reason("no reason given")
        raise PlanError(f"{graph.name}: {nvidia.library}'s parser refuses it ({said[:200]}).")
    stored = bundle.tensors(target)
    names = refittable_names(bundle, list(stored), options.refit)
    if unknown := [name for name in names if not network.mark_weights_refittable(name)]:
        raise PlanError(
            f"{graph.name}: {nvidia.library} can't refit {unknown[0]}; please report this."
        )
    config, flags = builder.create_builder_config(), []
    # TF32, on unless it is cleared, rounds what goes into a float32 product to fp16's digits.
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in _flags(options):
        config.set_flag(getattr(trt.BuilderFlag, name))
        flags.append(name)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        flags.append("AMPERE_PLUS")
    profile = builder.create_optimization_profile()
    image = (bundle.spec.channels, *bundle.spec.image_size)
    profile.set_shape("images", *((count, *image) for count in options.batch))
    config.add_optimization_profile(profile)
    # TensorRT-RTX has none: it chooses kernels on the machine that it runs on.
    file = options.timing_cache if nvidia.library == "tensorrt" else None
    cache = _read_cache(config, file) if file else None
    with deferred_interrupt() as interrupted:
        config.progress_monitor = _monitor(trt, progress, interrupted)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = nvidia.reason("no reason")
        raise PlanError(f"{graph.name}: {nvidia.library} can't build it ({reason}).")
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


def check_options(library: Library, options: PlanOptions) -> None:
    """Raise PlanError for an option that no version of a library has."""
    if options.version_compatible and library == "tensorrt-rtx":
        raise PlanError(
            "--version-compatible is TensorRT's alone: TensorRT-RTX runs only plans of its own "
            "version; leave it out."
        )


def check_can_build(nvidia: Nvidia, options: PlanOptions) -> Gpu | None:
    """The GPU that plans will be built on; None where they are built for other machines.

    Raises:
        PlanError: there is none and it takes one, or the library lacks what an option asks for.
        MissingPackageError: cuda-python is not installed.
    """
    library = nvidia.library
    check_options(library, options)
    for name, option in _flags(options).items():
        if not hasattr(nvidia.trt.BuilderFlag, name):
            hint = " (10.2 has), or build with --refit none" if name == "REFIT_INDIVIDUAL" else ""
            raise PlanError(
                f"{option}: {library} {nvidia.version} has no {name}; install a later one{hint}."
            )
    gpu = find_gpu()
    if gpu is None and (options.refit != "none" or library == "tensorrt"):
        raise PlanError(
            f"--engine {library}: no GPU that CUDA can use ({why_no_gpu()}). "
            + (
                "TensorRT-RTX builds ahead of time for other machines, with --refit none."
                if library == "tensorrt-rtx"
                else "TensorRT builds on the machine that the plan will run on."
            )
        )
    return gpu


def _flags(options: PlanOptions) -> dict[str, str]:
    """The builder's flag → the option that asks for it."""
    asked = {
        "REFIT_INDIVIDUAL": f"--refit {options.refit}" if options.refit != "none" else "",
        "STRIP_PLAN": "--strip" if options.strip else "",
        "VERSION_COMPATIBLE": "--version-compatible" if options.version_compatible else "",
    }
    return {name: option for name, option in asked.items() if option}


def _kept(nvidia: Nvidia, content: bytes, marked: list[str], options: PlanOptions) -> list[str]:
    """Of the marked weights, those that the plan can exchange: some may have been folded.

    Raises:
        PlanError: one that ToCom needs is not among them, or it asks for one that wasn't marked.
    """
    engine = open_engine(nvidia, content, options.version_compatible)  # the code is our own
    asked = set(open_refitter(nvidia, engine).get_all_weights())
    if more := sorted(asked - set(marked)):
        raise PlanError(
            f"{nvidia.library} built a plan whose refits would need {more[0]}, too, which was not "
            "marked; build with --refit none, and please report this."
        )
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


def _monitor(trt: Any, progress: Progress | None, interrupted: Callable[[], bool]) -> Any:
    """An ``IProgressMonitor`` that tells how far the outermost phase is, and stops on Ctrl-C."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if progress and phase in self._steps:
                progress(phase, step + 1, self._steps[phase])
            return not interrupted()  # asked in every phase: the outermost has few steps

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()

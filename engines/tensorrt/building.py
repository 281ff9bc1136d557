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
from tocom_export.io.atomic import replace_file
from tocom_export.io.tensors import Tensors
from tocom_export.variant import Variant

from .cuda import Gpu, find_gpu, why_no_gpu
from .identical import add_constants
from .interrupt import deferred_interrupt
from .known_bugs import check_refit
from .library import Library, Nvidia
from .plan import Batch, PlanRecord, Refit, Tensor, digest_fixed, list_marked
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
    detailed: bool = False
    """Tells an inspector what each layer became."""
    timing_cache: Path | None = None
    """What was measured in earlier builds; read and written."""

    @property
    def strips(self) -> bool:
        """Whether weights are left out of the plan."""
        return self.strip or self.refit == "identical"


def build_plan(
    nvidia: Nvidia,
    bundle: Bundle,
    variant: Variant,
    options: PlanOptions,
    progress: Progress | None = None,
) -> tuple[bytes, PlanRecord]:
    """Parse a variant's graph and let the library build it; the caller runs what comes of it.

    Strongly typed: the types are the graph's. Where weights are to be exchanged, only
    ``REFIT_INDIVIDUAL`` is set, with exactly those marked that a refit needs. ``REFIT_IDENTICAL``,
    which ``STRIP_PLAN`` alone implies, is undefined for other weights, and is for plans that take
    back their own alone.

    Raises:
        PlanError: the library can't parse or build it.
        KeyboardInterrupt: Ctrl-C, once the library has stopped.
    """
    graph, gpu = bundle.graph(variant.name), check_can_build(nvidia, options)
    builder = nvidia.trt.Builder(nvidia.logger)
    network = _parse_graph(nvidia, builder, graph)
    stored: Tensors = bundle.tensors(variant.name)
    names = list_marked(bundle, stored, options.refit)
    if unknown := [name for name in names if not network.mark_weights_refittable(name)]:
        raise PlanError(
            f"{graph.name}: {nvidia.library} can't refit {unknown[0]}; please report this."
        )
    config, flags = _configure(nvidia, builder, bundle, options)
    # TensorRT-RTX has no timings: it chooses kernels on the machine that it runs on.
    cache = options.timing_cache if nvidia.library == "tensorrt" else None
    if cache:
        _read_cache(config, cache)
    with deferred_interrupt() as interrupted:
        config.progress_monitor = _monitor(nvidia.trt, progress, interrupted)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanError(f"{graph.name}: {nvidia.library} can't build it ({nvidia.reason()}).")
    if cache:
        with suppress(OutputError), replace_file(cache) as beside:
            beside.write_bytes(bytes(config.get_timing_cache().serialize()))
    content, identical = bytes(plan), options.refit == "identical"
    if identical:
        stored = add_constants(bundle, variant.name, stored)
        names = list(stored)
    if names:
        names = _keep_asked(nvidia, content, names, options)
    return content, PlanRecord(
        variant=variant,
        spec=bundle.spec,
        method=bundle.method,
        precision=bundle.precision,
        refit=options.refit,
        stripped=options.strips,
        batch=options.batch,
        refittable={name: Tensor(stored[name].shape, stored[name].dtype.name) for name in names},
        fixed=digest_fixed(stored, () if identical else names),
        backend=nvidia.library,
        version=nvidia.version,
        compute_capability=gpu.capability if gpu else None,
        gpu=gpu.name if gpu else None,
        flags=flags,
        sha256=hashlib.sha256(content).hexdigest(),
        outputs=bundle.outputs,
        unit_embedding=bundle.unit_embedding,
    )


def _parse_graph(nvidia: Nvidia, builder: Any, graph: Path) -> Any:
    """The library's network of a graph; it keeps the parser alive, which holds its weights."""
    trt = nvidia.trt
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, nvidia.logger)
    with deferred_interrupt():
        parsed = parser.parse_from_file(str(graph))
    if not parsed:
        said = parser.get_error(0).desc() if parser.num_errors else nvidia.reason()
        raise PlanError(f"{graph.name}: {nvidia.library}'s parser refuses it ({said[:200]}).")
    return network


def _configure(
    nvidia: Nvidia, builder: Any, bundle: Bundle, options: PlanOptions
) -> tuple[Any, tuple[str, ...]]:
    """The builder's configuration, and the names of the flags that were set."""
    trt = nvidia.trt
    config = builder.create_builder_config()
    flags = tuple(_flags(options))
    # TF32, on unless it is cleared, rounds what goes into a float32 product to fp16's digits.
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        flags = (*flags, "AMPERE_PLUS")
    profile = builder.create_optimization_profile()
    image = (bundle.spec.channels, *bundle.spec.image_size)
    profile.set_shape("images", *((count, *image) for count in options.batch))
    config.add_optimization_profile(profile)
    if options.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return config, flags


def check_options(library: Library, options: PlanOptions) -> None:
    """Raise PlanError for an option that no version of a library has."""
    if options.version_compatible and library == "tensorrt-rtx":
        raise PlanError(
            "`version_compatible` is TensorRT's alone: TensorRT-RTX runs only plans of its own "
            "version; leave it out."
        )


def check_can_build(nvidia: Nvidia, options: PlanOptions) -> Gpu | None:
    """The GPU that plans will be built on; None where they are built for other machines.

    Raises:
        PlanError: there is none and it takes one, or the library lacks what an option asks for,
            or is known to build such plans wrongly.
    """
    library = nvidia.library
    check_options(library, options)
    check_refit(nvidia, options.refit)
    for name, option in _flags(options).items():
        if not hasattr(nvidia.trt.BuilderFlag, name):
            hint = " (10.2 has), or choose `refit` none" if name == "REFIT_INDIVIDUAL" else ""
            raise PlanError(
                f"{option}: {library} {nvidia.version} has no {name}; install a later one{hint}."
            )
    gpu = find_gpu()
    if gpu is None and (options.refit != "none" or library == "tensorrt"):
        why = f"`backend` {library}: no GPU that CUDA can use ({why_no_gpu()})."
        if library == "tensorrt":
            raise PlanError(f"{why} TensorRT builds on the machine that the plan will run on.")
        raise PlanError(
            f"{why} TensorRT-RTX builds ahead of time for other machines, with `refit` none."
        )
    return gpu


def _flags(options: PlanOptions) -> dict[str, str]:
    """The builder's flag → the parameter that asks for it."""
    asked = {
        "REFIT_INDIVIDUAL": f"`refit` {options.refit}" if options.refit in ("qkv", "all") else "",
        "REFIT_IDENTICAL": "`refit` identical" if options.refit == "identical" else "",
        "STRIP_PLAN": "`strip`" if options.strips else "",
        "VERSION_COMPATIBLE": "`version_compatible`" if options.version_compatible else "",
    }
    return {name: option for name, option in asked.items() if option}


def _keep_asked(
    nvidia: Nvidia, content: bytes, known: list[str], options: PlanOptions
) -> list[str]:
    """Of the weights that can be given, those that the plan asks for: some may have been folded."""
    engine = open_engine(nvidia, content, options.version_compatible)  # the code is our own
    asked = set(open_refitter(nvidia, engine).get_all_weights())
    if more := sorted(asked - set(known)):
        raise PlanError(
            f"{nvidia.library} built a plan that asks for {more[0]}, too, which it can't be given; "
            "build with `refit` none, and please report this."
        )
    lost = [name for name in known if name not in asked]
    if lost and options.refit == "qkv":
        raise PlanError(
            f"{nvidia.library} built a plan that can't exchange {lost[0]}; report this."
        )
    return [name for name in known if name in asked]


def _read_cache(config: Any, file: Path) -> None:
    """Use the timing cache in a file; a new one in place of another device's or version's."""
    content = b""
    with suppress(OSError):
        content = file.read_bytes()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


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

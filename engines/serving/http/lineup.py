"""What a model is served from: engines, how long they take, and what chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tocom_export.bundle.manifest import WEIGHTS
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.errors import DegreeError, PoolError

from ...bench.timing import Timing, time_engines
from ...verify import sample_images
from ..policy import Policy
from ..pool import EnginePool
from ..slackfit import SlackFit
from ..steering import Steering
from .control import Control
from .protocol import Form
from .serve_options import ServeOptions

_SLO_RATIO = 6
"""The latency wanted where none is named, over that of a request to the slowest variant."""
_TIMING, _TIMING_AT_MOST = 0.3, 2.0
"""Seconds of runs for each variant and batch, before it is served: ten runs of those that take up
to a fifth of a second, for fewer let chance put them in order."""
Seconds = Mapping[str, Mapping[int, float]]
"""Variant → batch → how long it takes."""


@dataclass
class Lineup:
    """All that is exchanged where a bundle's files are taken again."""

    pool: EnginePool
    most: int
    """Images in a run."""
    form: Form
    seconds: Seconds
    """Empty where no policy needs to know."""
    slo: float | None
    control: Control
    origin: Checkpoint
    """The file of the weights that serve, and what it says of them; without the weights."""

    @classmethod
    def of(
        cls,
        pool: EnginePool,
        options: ServeOptions,
        before: Lineup | None = None,
        tell: Callable[[], None] = lambda: None,
    ) -> Lineup:
        """Run each variant of a pool, and time them unless all are known from before.

        Args:
            tell: called before they are timed, which takes seconds.

        Raises:
            TocomError: the pool lacks a variant that has to be there, or is of another model than
                before.
        """
        if before is not None:
            _check_same(pool, before.pool)
        pinned = None if before is None else before.control.pinned
        fixed = _choose_fixed(pool, options, pinned)
        largest = [most for v in pool.variants if (most := pool.open(v).engine.largest) is not None]
        most = min([options.max_batch, *largest])
        seconds, slo = _recall(pool, most, before), options.slo if before is None else before.slo
        unknown = options.steered and seconds is None
        if unknown:
            tell()
        warm_up(pool, most)
        if unknown:
            timed = time_variants(pool, most)
            # Others' load scatters the rest and would put variants out of their order; how much
            # slower runs are in fact, a policy learns from them.
            seconds = {
                variant: {batch: found.min_ms / 1000 for batch, found in times.items()}
                for variant, times in timed.items()
            }
            if slo is None:
                slo = _SLO_RATIO * max(times[1].median_ms for times in timed.values()) / 1000
        spec = pool.spec
        form = Form((spec.channels, *spec.image_size), most, pool.bundle.outputs)
        policy = make_policy(pool, options, seconds or {}, slo, most)
        control = Control(policy, fixed, most)
        control.pinned = pinned
        origin = describe_origin(Checkpoint.open(pool.bundle.path / WEIGHTS, None, spec))
        return cls(pool, most, form, seconds or {}, slo, control, origin)

    def renew(self, options: ServeOptions) -> None:
        """Begin to choose afresh, after other weights."""
        self.control.renew(make_policy(self.pool, options, self.seconds, self.slo, self.most))


def make_policy(
    pool: EnginePool, options: ServeOptions, seconds: Seconds, slo: float | None, most: int
) -> Policy | None:
    """What chooses the variants of a pool; None where one is fixed."""
    if not options.steered or slo is None:
        return None
    known: dict[str, Any] = {
        "accuracy": pool.bundle.accuracy,
        "variants": pool.variants,
        "max_batch": most,
    }
    if options.policy == "slackfit":
        return SlackFit(seconds, slo, **known)
    return Steering(seconds, slo, **known)


def describe_origin(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint without its weights."""
    return Checkpoint(checkpoint.file, {}, checkpoint.info)


def warm_up(pool: EnginePool, most: int) -> None:
    """Run batches of two and of the most, for what an engine does once it has to."""
    for batch in sorted({2, most} - {1}):
        images = sample_images(pool.spec, min(batch, most))
        for name in pool.variants:
            pool.open(name).engine.run(images)


def time_variants(pool: EnginePool, most: int) -> dict[str, dict[int, Timing]]:
    """Variant → batch → how long one takes, in turns: of one image, half the most, and the most."""
    found: dict[str, dict[int, Timing]] = {name: {} for name in pool.variants}
    for batch in sorted({1, -(-most // 2), most}):
        images = sample_images(pool.spec, batch)
        runs = {name: partial(pool.open(name).run, images) for name in pool.variants}
        for name, timing in time_engines(runs, batch, _TIMING, at_most=_TIMING_AT_MOST).items():
            found[name][batch] = timing
    return found


def _recall(pool: EnginePool, most: int, before: Lineup | None) -> Seconds | None:
    """The times from before where all variants are as they were: others' would not compare."""
    if before is None or (before.most, before.pool.backend) != (most, pool.backend):
        return None
    old, new = before.pool.bundle, pool.bundle
    if old.precision != new.precision or old.method != new.method:
        return None
    for name in pool.variants:
        same = name in before.seconds and old.variants[name].degrees == new.variants[name].degrees
        if not same:
            return None
    return {name: before.seconds[name] for name in pool.variants}


def _check_same(pool: EnginePool, before: EnginePool) -> None:
    """Raise PoolError where clients would have to send or expect something else."""
    new, old, path = pool.bundle, before.bundle, pool.bundle.path
    if pool.spec != before.spec:
        raise PoolError(f"{path} is of another model now; start a server of it.")
    if (new.outputs, new.unit_embedding) != (old.outputs, old.unit_embedding):
        raise PoolError(
            f"{path} gives other outputs now ({', '.join(new.outputs)}); start a server of it."
        )


def _choose_fixed(pool: EnginePool, options: ServeOptions, pinned: str | None) -> str:
    """The variant where no policy chooses.

    Raises:
        DegreeError, PoolError: the pool lacks what was asked for, or what an administrator has put
            in force.
    """
    have = f"it has {', '.join(pool.variants)}"
    if pinned is not None and pinned not in pool.variants:
        raise PoolError(
            f"{pool.bundle.path} has no variant {pinned} now, which was switched to; {have}. "
            "Switch to one that it has, or to null, then reload."
        )
    if options.variant is None:
        return pool.variants[0]
    try:
        return pool.bundle.variant(options.variant).name
    except DegreeError:
        if pinned is None:
            raise
        return pool.variants[0]

"""A model that is served: its pool, what chooses the variant, who waits, and who runs it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import ImageError, InputError, TocomError

from ...bench.timing import Timing, time_engines
from ...verify import sample_images
from ..loaded import Serving
from ..policy import Policy
from ..pool import EnginePool
from ..slackfit import SlackFit
from ..steering import Steering
from .control import Control
from .counts import Counts
from .line import Answer, Line, Ticket, refuse_late, refuse_stopping
from .protocol import Form
from .refusals import Refusal, refuse

log = logging.getLogger("tocom_export.serve")
_IDLE = 0.25
"""Seconds after which a policy is asked although nobody waits: load has fallen."""
_SLO_RATIO = 6
"""The latency wanted where none is named, over that of a request to the slowest variant."""
_TIMING, _TIMING_AT_MOST = 0.3, 1.0
"""Seconds of runs for each variant, before it is served."""


@dataclass(frozen=True)
class ServeOptions:
    """How models are served."""

    policy: Literal["steering", "slackfit", "fixed"] | None = None
    """None is steering, or fixed where a variant is named."""
    slo: float | None = None
    """Latency wanted, seconds, which a policy keeps to and misses are counted of; None is six times
    what the slowest variant takes, or none where the variant is fixed."""
    variant: str | None = None
    """The one to serve where it is fixed; None is the one of the most MACs."""
    max_batch: int = 8
    max_delay: float = 0.0
    """Seconds that a request waits for others to be run with."""
    queue: int = 128
    """Images that may wait."""

    def __post_init__(self) -> None:
        if self.variant is not None and self.policy not in (None, "fixed"):
            raise InputError(f"`variant` is for `policy` fixed; {self.policy} chooses by itself.")
        if self.slo is not None and not 0 < self.slo < math.inf:
            raise InputError("`slo_ms`: a latency is more than nothing.")

    @property
    def steered(self) -> bool:
        """Whether load decides."""
        return (self.policy or ("fixed" if self.variant else "steering")) != "fixed"


class Service:
    """One model, served under a name by a thread of its own.

    Args:
        name: in addresses.
        pool: closed by :meth:`close`.
    """

    def __init__(self, name: str, pool: EnginePool, options: ServeOptions) -> None:
        self.name, self.pool, self.options = name, pool, options
        largest = [most for v in pool.variants if (most := pool.open(v).engine.largest) is not None]
        self.most = min([options.max_batch, *largest])
        warm_up(pool, self.most)
        timed = time_variants(pool, self.most) if options.steered else {}
        # Others' load scatters the rest and would put variants out of their order; how much
        # slower runs are in fact, a policy learns from them.
        self.seconds = {
            variant: {batch: found.min_ms / 1000 for batch, found in times.items()}
            for variant, times in timed.items()
        }
        """Variant → batch → how long it takes; empty where no policy needs to know."""
        spec = pool.spec
        self.form = Form((spec.channels, *spec.image_size), self.most, pool.bundle.outputs)
        self.slo = options.slo
        if options.steered and self.slo is None:
            self.slo = _SLO_RATIO * max(times[1].median_ms for times in timed.values()) / 1000
        fixed = pool.variants[0] if options.variant is None else options.variant
        self.control = Control(self._make_policy(), pool.open(fixed).variant.name, self.most)
        self.line = Line(options.queue)
        self.preparing = 0
        """Requests that are made ready to wait in it; for the event loop's thread alone."""
        self.counts = Counts(pool.variants, self.slo)
        self.changing = threading.Lock()
        """Held while an administrator's wish is carried out."""
        self._use(self.control.variant)
        self._thread = threading.Thread(target=self._work, name=f"serve {name}", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls, name: str, path: Path, options: ServeOptions, backend: Any = "auto", **engine: Any
    ) -> Service:
        """Open a bundle, run each of its variants, and serve them.

        Raises:
            TocomError: what opening a pool raises; the bundle has no such variant.
        """
        variants = list(Bundle.open(path).variants)  # named, so that a reload finds the same
        batch = sorted({1, options.max_batch})
        pool = EnginePool(path, variants=variants, backend=backend, batch=batch, **engine)
        if options.variant is not None:
            pool.bundle.variant(options.variant)
        return cls(name, pool, options)

    @property
    def about(self) -> str:
        """What is served and how, in a line for people."""
        engine = self.pool.serving.engine.about
        if not self.options.steered:
            return f"{self.name}: {self.control.variant}, {engine}."
        ladder = ", ".join(f"{n} {1000 * s[1]:.1f} ms" for n, s in self.seconds.items())
        wanted = 1000 * (self.slo or 0)
        return f"{self.name}: {ladder}; {engine}; wanted within {wanted:.0f} ms."

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def find(self, version: str | None) -> Serving:
        """What would run a request to a version, or to none.

        Raises:
            Refusal: there is no such version.
        """
        try:
            return self.pool.open(self.control.variant if version is None else version)
        except InputError:
            known = ", ".join(self.pool.variants)
            text = f"model {self.name!r} has no version {str(version)[:64]!r}; it has {known}."
            raise Refusal(404, text) from None

    def pin(self, variant: str | None) -> None:
        """Put a variant in force whatever the load, or let the policy choose again (None)."""
        self.control.pinned = None if variant is None else self.pool.open(variant).variant.name
        self.line.wake()

    def refit(self, **new: Any) -> None:
        """Exchange the weights, as :meth:`EnginePool.refit`, while requests are answered."""
        with self.changing:
            self.pool.refit(**new)
            self.control.renew(self._make_policy())
            self.counts.note_refit()

    def reload(self) -> None:
        """Take the bundle's files again, as :meth:`EnginePool.reload`."""
        with self.changing:
            self.pool.reload()
            self.control.renew(self._make_policy())
            self.counts.note_refit()

    def close(self) -> None:
        """Refuse who waits, wait for the run under way, and let the engines go."""
        for ticket in self.line.close():
            self.counts.note_failure(ticket.variant or self.control.variant)
            ticket.settle(refuse_stopping())
        self._thread.join()
        self.pool.close()

    def _make_policy(self) -> Policy | None:
        if not self.options.steered or self.slo is None:
            return None
        known: dict[str, Any] = {
            "accuracy": self.pool.bundle.accuracy,
            "variants": self.pool.variants,
            "max_batch": self.most,
        }
        if self.options.policy == "slackfit":
            return SlackFit(self.seconds, self.slo, **known)
        return Steering(self.seconds, self.slo, **known)

    def _use(self, name: str) -> Serving:
        """The variant in force, which the pool serves from now on."""
        self.counts.note_variant(name)
        return self.pool.switch(name)

    def _work(self) -> None:
        """Until the line is closed: choose a variant, take who waits, run and answer them."""
        while (look := self.line.wait(self.most, self.options.max_delay, _IDLE)) is not None:
            try:
                most = self.control.choose(look)
                serving = self._use(self.control.variant)
                batch, late = self.line.take(most)
                self.control.note_taken(look, sum(ticket.count for ticket in batch + late))
                for ticket in late:
                    self.counts.note_failure(ticket.variant or serving.variant.name, late=True)
                    ticket.settle(refuse_late())
                if batch:
                    self._run(serving, batch)
            except Exception:
                log.exception("%s: choosing a variant failed", self.name)
                time.sleep(_IDLE)

    def _run(self, serving: Serving, batch: Sequence[Ticket]) -> None:
        """Run requests to one variant together, and answer each; raises nothing."""
        name = batch[0].variant or serving.variant.name
        try:
            if batch[0].variant is not None:
                serving = self.pool.open(batch[0].variant)
                name = serving.variant.name
            images = batch[0].images
            if len(batch) > 1:
                images = np.concatenate([ticket.images for ticket in batch])
            start = time.monotonic()
            found = serving.run_all(images)
            end = time.monotonic()
        except ImageError as error:
            if len(batch) > 1:  # of one of them; the others are not to suffer
                for ticket in batch:
                    self._run(serving, [ticket])
                return
            self._fail(name, batch, refuse(error, self.paths))
        except TocomError as error:
            log.error("%s: %s", self.name, error)
            self._fail(name, batch, refuse(error, self.paths))
        except Exception:
            log.exception("%s: a run failed", self.name)
            self._fail(name, batch, Refusal(500, "the model could not be run."))
        else:
            self.counts.note_run(name, [(t.arrived, t.count) for t in batch], start, end)
            first = 0
            for ticket in batch:
                rows = {n: output[first : first + ticket.count] for n, output in found.items()}
                ticket.settle(Answer(rows, serving.variant, ticket.arrived, start, end))
                first += ticket.count
            self.control.observe(name, end - start, len(images))

    def _fail(self, variant: str, batch: Sequence[Ticket], refusal: Refusal) -> None:
        for ticket in batch:
            self.counts.note_failure(variant)
            ticket.settle(refusal)

    @property
    def paths(self) -> Mapping[str, str]:
        """Of this machine, that an error may name → what is said instead."""
        path = self.pool.bundle.path
        return {str(path.absolute()): self.name, str(path): self.name}


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

"""A model that is served: its pool, what chooses the variant, who waits, and who runs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.errors import ImageError, InputError, TocomError
from tocom_export.io.memory import release_memory

from ..loaded import Serving
from ..pool import EnginePool
from .control import Control
from .counts import Counts, name_reason
from .line import Answer, Line, Ticket, refuse_late, refuse_stopping
from .lineup import Lineup, Seconds, describe_origin
from .protocol import Form
from .refusals import Refusal, refuse
from .serve_options import ServeOptions
from .telling import Seldom, log
from .yielding import give_way, run_below

_IDLE = 0.25
"""Seconds after which a policy is asked although nobody waits: load has fallen."""
_OVERLOAD = 60.0
"""Seconds between two words on an overload."""


class Service:
    """One model, served under a name by a thread of its own.

    Args:
        name: in addresses.
        reopen: opens a pool of the bundle's files as they are.
        tell: called before its variants are timed, which takes seconds.
    """

    def __init__(
        self,
        name: str,
        reopen: Callable[[], EnginePool],
        options: ServeOptions,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.options, self._reopen = name, options, reopen
        self._lineup = run_below(lambda: Lineup.of(reopen(), options, tell=tell))
        self.line = Line(options.queue)
        self.preparing = 0
        """Requests that are made ready to wait in it; for the event loop's thread alone."""
        self.overload = Seldom(_OVERLOAD)
        self.counts = Counts(self.pool.variants, self.slo)
        self.changing = threading.Lock()
        """Held while an administrator's wish is carried out."""
        self._exchanging = threading.Lock()
        self._use(self._lineup)
        self._thread = threading.Thread(target=self._work, name=f"serve {name}", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        name: str,
        path: Path,
        options: ServeOptions,
        tell: Callable[[], None] = lambda: None,
        **engine: Any,
    ) -> Service:
        """Open a bundle, run each of its variants, and serve them.

        Args:
            engine: backend, device, threads and the like, as of :class:`EnginePool`.

        Raises:
            TocomError: what opening a pool raises; the bundle has no such variant.
        """
        batch = sorted({1, options.max_batch})
        return cls(name, partial(EnginePool, path, batch=batch, **engine), options, tell)

    @property
    def pool(self) -> EnginePool:
        """The engines that serve."""
        return self._lineup.pool

    @property
    def control(self) -> Control:
        """What chooses the variant."""
        return self._lineup.control

    @property
    def form(self) -> Form:
        """What images are taken."""
        return self._lineup.form

    @property
    def most(self) -> int:
        """Images in a run."""
        return self._lineup.most

    @property
    def seconds(self) -> Seconds:
        """Variant → batch → how long it takes; empty where no policy needs to know."""
        return self._lineup.seconds

    @property
    def slo(self) -> float | None:
        """Latency wanted, seconds; stays what it is when the bundle is taken again."""
        return self._lineup.slo

    @property
    def about(self) -> str:
        """What is served and how, in a line for people."""
        engine = self.pool.serving.engine.about
        if not self.options.steered:
            return f"{self.name}: {self.control.variant}, {engine}."
        ladder = ", ".join(f"{n} {1000 * s[1]:.1f} ms" for n, s in self.seconds.items())
        wanted = f"{self.name}: {ladder}; {engine}; wanted within {1000 * (self.slo or 0):.3g} ms"
        if (self.slo or 0) < min(took[1] for took in self.seconds.values()):
            return f"{wanted}, which is less than any of them takes."
        return f"{wanted}."

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
        with self._exchanging:
            name = None if variant is None else self.pool.open(variant).variant.name
            self.control.pinned = name
        self.line.wake()

    def refit(self, *, source: int | None = None, **new: Any) -> None:
        """Exchange the weights, as :meth:`EnginePool.refit`, while requests are answered.

        Raises:
            CheckpointError: the weights say that they were trained at another source, the present
                ones as well as those of a new checkpoint.
        """
        with self.changing:
            lineup = self._lineup
            present = {variant.source for variant in lineup.pool.bundle.variants.values()}
            if "checkpoint" not in new and source is not None and present != {source}:
                lineup.origin.choose_source(source)
            origin = lineup.origin
            if "checkpoint" in new:
                opened = Checkpoint.open(new["checkpoint"], new.get("weights_key"), self.pool.spec)
                origin = describe_origin(opened)
            run_below(partial(lineup.pool.refit, source=source, **new))
            lineup.origin = origin
            lineup.renew(self.options)
            self.counts.note_refit()

    def reload(self) -> None:
        """Take the bundle's files as they are now, with the variants that it has now.

        All of it is opened, run and timed beside what serves, and put in its place in one step; a
        run that is under way ends on the old.

        Raises:
            PoolError: it is of another model, gives other outputs, or lacks the variant that an
                administrator has put in force.
            TocomError: as :meth:`open`. Whatever fails, all goes on as it was.
        """
        with self.changing:
            before = self._lineup
            after = run_below(lambda: Lineup.of(self._reopen(), self.options, before))
            self.counts.add_variants(after.pool.variants)
            with self._exchanging:
                pinned = before.control.pinned  # since then, perhaps
                after.control.pinned = pinned if pinned in after.pool.variants else None
                self._use(after)
                self._lineup = after
            self.counts.note_refit()
        self.line.wake()
        release_memory()

    def turn_away(self) -> None:
        """Refuse who waits, and whoever would."""
        for ticket in self.line.close():
            ticket.settle(refuse_stopping())

    def close(self) -> None:
        """Refuse who waits, wait for the run under way, and let the engines go."""
        self.turn_away()
        self._thread.join()
        self.pool.close()

    def _use(self, lineup: Lineup) -> Serving:
        """The variant in force, which its pool serves from now on."""
        name = lineup.control.variant
        self.counts.note_variant(name)
        return lineup.pool.switch(name)

    def _work(self) -> None:
        """Until the line is closed: choose a variant, take who waits, run and answer them."""
        give_way()
        while (look := self.line.wait(self.most, self.options.max_delay, _IDLE)) is not None:
            try:
                lineup = self._lineup
                most = lineup.control.choose(look)
                serving = self._use(lineup)
                batch, late = self.line.take(most)
                lineup.control.note_taken(look, sum(ticket.count for ticket in batch + late))
                for ticket in late:
                    ticket.settle(refuse_late())
                if batch:
                    self._run(lineup, serving, batch)
            except Exception:
                log.exception("%s: choosing a variant failed", self.name)
                time.sleep(_IDLE)

    def _run(self, lineup: Lineup, serving: Serving, batch: Sequence[Ticket]) -> None:
        """Run requests to one variant together, and answer each; raises nothing."""
        name = batch[0].variant or serving.variant.name
        try:
            if batch[0].variant is not None:
                serving = self.find(batch[0].variant)
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
                    self._run(lineup, serving, [ticket])
                return
            self._fail(name, batch, refuse(error, self.paths))
        except Refusal as refusal:  # a reload has taken the variant away
            self._fail(name, batch, refusal)
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
            lineup.control.observe(name, end - start, len(images))

    def _fail(self, variant: str, batch: Sequence[Ticket], refusal: Refusal) -> None:
        refusal.counted = True
        for ticket in batch:
            self.counts.note_failure(variant, name_reason(refusal))
            ticket.settle(refusal)

    @property
    def paths(self) -> Mapping[str, str]:
        """Of this machine, that an error may name → what is said instead."""
        path = self.pool.bundle.path
        return {str(path.absolute()): self.name, str(path): self.name}

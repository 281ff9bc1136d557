"""From a budget and some pictures to the schedule that loses least at that cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np

from tocom_export.compression.schedule import MAX_DEGREE, Schedule
from tocom_export.errors import InputError
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant

from ..accuracy import run_in_parts
from ..bench.timing import time_engines
from ..engine import Engine, Images
from ..verify import sample_images
from .budget import Budget, Constant, Found
from .cost import LatencyModel, list_probes
from .journal import Journal
from .objective import Objective, Run
from .search import Candidate, Cost, Search
from .trial import Workshop

LEAST_IMAGES = 32
_SECONDS = 0.5
"""For each engine that is measured."""
_FINALISTS = 3
_ROUNDS = 3
"""Of searches, as the latency that was foretold is set right by what was measured."""
SCALES = (0.02, 0.05, 0.1, 0.15, 0.2)

Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]


class Tuner:
    """Finds variants of a bundle for budgets.

    Args:
        images: normalised (N, C, H, W) float32; every other one is searched with, the others judge
            what was found.
        batch: images in a run, of what is measured and of what is judged.
        labels: (N,), to be judged by accuracy in place of divergence.
        trials: candidates at the most, for each budget.
        journal: keeps what is found out.

    Raises:
        InputError: there are too few images.
    """

    def __init__(
        self,
        workshop: Workshop,
        images: Images,
        journal: Journal,
        *,
        batch: int = 1,
        labels: Sequence[int] | None = None,
        trials: int = 200,
        seed: int = 0,
        progress: Progress = lambda title, total: nullcontext(lambda **_: None),
    ) -> None:
        if len(images) < LEAST_IMAGES:
            raise InputError(
                f"`images`: there are {len(images)}; {LEAST_IMAGES} are the least, some hundreds "
                "are better."
            )
        self.workshop, self.journal, self.batch = workshop, journal, batch
        self.trials, self.seed, self.progress = trials, seed, progress
        self.spec: VitSpec = workshop.bundle.spec
        self._merge = workshop.bundle.method.merge
        self._run_batch = max(batch, 16)
        source = next(iter(workshop.bundle.variants.values())).source
        # At the degree that it was trained at a model is what it is, without compensation.
        base = self._open_run(workshop.make_variant(source, name="base"))
        parts = []
        for half in (slice(0, None, 2), slice(1, None, 2)):
            own = images[half]
            starts = range(0, len(own), self._run_batch)
            wanted = np.concatenate([base(own[i : i + self._run_batch]) for i in starts])
            known = None if labels is None else labels[half]
            parts.append(Objective(own, wanted, self._run_batch, workshop.bundle.has_logits, known))
        self._search_with, self._report_with = parts

    def tune(self, budget: Budget, name: str | None = None, scales: bool = False) -> Found:
        """The variant of a budget.

        Raises:
            InputError: nothing costs so little, or the uncompressed model doesn't cost more.
        """
        limit, cost = self._set_limit(budget)
        measured = budget.kind != "macs"
        aim = limit
        for _ in range(_ROUNDS if measured else 1):
            ranked = self._search(budget, cost, aim)
            if not measured:
                best = ranked[0]
                break
            times = self._measure([c.degrees for c in ranked[:_FINALISTS]])
            within = [c for c in ranked[:_FINALISTS] if times[c.degrees] <= 1.01 * limit]
            if within:
                best = within[0]
                break
            aim *= limit / min(times.values())
        else:
            raise InputError(
                f"`{budget.option}` {budget.amount:g}: what was found is slower than that on this "
                "machine; try again when it is less busy, or choose a larger budget."
            )
        scale = self._choose_scale(best.degrees) if scales else None
        variant = self.workshop.make_variant(best.degrees, scale, name or budget.name)
        return self._compare(budget, variant, ranked, limit, cost, measured)

    def _set_limit(self, budget: Budget) -> tuple[float, Cost]:
        """What may be spent, and the cost of a schedule in the same measure."""
        spec, dense = self.spec, Schedule.of(self.spec, 0, self._merge)
        cost: Cost
        if budget.kind == "macs":
            cost = lambda schedule: float(schedule.macs(spec))  # noqa: E731
            whole = cost(dense)
            limit = budget.amount * whole
        else:
            probes = list_probes(spec, self._merge)
            times = self._measure([probe.removed for probe in probes])
            measured = {probe: times[probe.removed] for probe in probes}
            whole = times[dense.removed]
            limit = whole / budget.amount if budget.kind == "speedup" else budget.amount
            cost = LatencyModel.of(spec, measured).adjust(measured, limit).predict
        if limit >= whole:
            unit = "MACs" if budget.kind == "macs" else "ms"
            raise InputError(
                f"`{budget.option}` {budget.amount:g}: the uncompressed model costs no more than "
                f"that ({whole:.3g} {unit}); nothing is to be removed."
            )
        return limit, cost

    def _search(self, budget: Budget, cost: Cost, limit: float) -> list[Candidate]:
        with self.progress(f"{budget.name}: searching", self.trials) as update:

            def tell(count: int, best: Candidate) -> None:
                title = f"{budget.name}: best so far {best.loss:.4f}"
                update(completed=count, description=title)

            given = (cost, self._judge, limit, self.trials, self.seed, tell)
            search = Search(self.spec, *given, merge=self._merge)
            ranked = search.run()
        if not ranked:
            raise InputError(
                f"`{budget.option}` {budget.amount:g}: no schedule of {self.spec.model} costs so "
                "little; choose a larger budget."
            )
        return ranked

    def _judge(self, degrees: Sequence[int], best: float) -> float:
        find = partial(self._run, degrees, None, self._search_with, best)
        found: float = self.journal.ask(["loss", list(degrees), best], find)
        return found

    def _run(
        self,
        degrees: Sequence[int],
        scale: float | None,
        objective: Objective,
        best: float = np.inf,
    ) -> float:
        return objective.judge(self._open_run(self.workshop.make_variant(degrees, scale)), best)

    def _open_run(self, variant: Variant) -> Run:
        """A variant's run: its logits, or the embedding where it has none."""
        bundle, engine = self.workshop.bundle, self.workshop.open(variant, self._run_batch)
        output = "logits" if bundle.has_logits else bundle.find_output("embedding")
        return run_in_parts(engine, output)

    def _choose_scale(self, degrees: Sequence[int]) -> float:
        """The scale of the bank at which a schedule diverges least."""
        if self.workshop.weights.bank is None:
            raise InputError("`scale`: the bundle isn't compensated; there is nothing to scale.")
        losses = {
            scale: self.journal.ask(
                ["scale", list(degrees), scale],
                partial(self._run, degrees, scale, self._search_with),
            )
            for scale in SCALES
        }
        return min(losses, key=lambda scale: losses[scale])

    def _measure(self, lists: Sequence[Sequence[int]]) -> Mapping[tuple[int, ...], float]:
        """Milliseconds of a batch, all lists in turns."""
        keys = [tuple(degrees) for degrees in lists]

        def find() -> list[float]:
            engines: dict[tuple[int, ...], Engine] = {}
            for number, key in enumerate(keys):
                variant = self.workshop.make_variant(key, name=f"timed{number}")
                engines[key] = self.workshop.open(variant, self.batch)
            images = sample_images(self.spec, self.batch)
            runs = {key: partial(engine.run, images) for key, engine in engines.items()}
            timed = time_engines(runs, self.batch, _SECONDS)
            return [timed[key].min_ms for key in keys]

        times: list[float] = self.journal.ask(["ms", [list(key) for key in keys]], find)
        return dict(zip(keys, times, strict=True))

    def _compare(
        self,
        budget: Budget,
        variant: Variant,
        ranked: Sequence[Candidate],
        limit: float,
        cost: Cost,
        measured: bool,
    ) -> Found:
        """What was found beside the constant degrees, on the pictures that were kept back."""
        spec = self.spec
        constants = [Schedule.of(spec, degree, self._merge) for degree in range(MAX_DEGREE + 1)]
        times: Mapping[tuple[int, ...], float] = {}
        if measured:
            near = [c for c in constants if cost(c) <= 1.15 * limit][:4]
            times = self._measure([variant.schedule(spec).removed, *(c.removed for c in near)])
            allowed = [c for c in near if times[c.removed] <= 1.01 * limit][:1]
        else:
            allowed = [c for c in constants if cost(c) <= limit][:1]
        held = partial(self._report, variant.scale)
        points = [
            ("found", cost(Schedule.of(spec, c.degrees, self._merge)), c.loss) for c in ranked
        ]
        for constant in constants:
            points.append(("constant", cost(constant), self._judge(constant.degrees, float("inf"))))
        own, best = variant.schedule(spec), next(iter(allowed), None)
        beside = None
        if best is not None:
            beside = Constant(
                best.degrees[0], best.macs(spec), times.get(best.removed), held(best.degrees)
            )
        return Found(
            budget, variant, own.macs(spec), times.get(own.removed), held(variant.degrees), beside,
            len(ranked), tuple(points),
        )  # fmt: skip

    def _report(self, scale: float, degrees: Sequence[int]) -> float:
        found: float = self.journal.ask(
            ["report", list(degrees), scale], partial(self._run, degrees, scale, self._report_with)
        )
        return found

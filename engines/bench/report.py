"""What was measured of a bundle, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.schedule import Schedule

from .timing import Timing

if TYPE_CHECKING:
    from ..serving.arrivals import Arrivals
    from ..serving.simulation import Comparison
    from ..tensorrt.trtexec import LayerTime

SLOWEST = 5
"""Layers of a plan that are named."""


@dataclass(frozen=True)
class Row:
    """How fast one engine, or a peer that one would run instead, is at one batch."""

    name: str
    """Of the variant, or of the peer."""
    backend: str
    """``onnx``, ``openvino``, ``tensorrt``, ``trtexec``, ...; a peer's also ``torch``."""
    precision: str
    """What it computes in."""
    variant: str
    """Of a peer, the one whose tokens it keeps: ``r00`` is the dense model."""
    timing: Timing
    peer: bool = False
    memory: int | None = None
    """Bytes of a process that runs it alone, at the largest batch; None where unknown."""


@dataclass(frozen=True)
class Report:
    """All that was measured of one bundle."""

    bundle: Bundle
    device: str
    """The processor or GPU."""
    rows: Sequence[Row]
    not_timed: Sequence[str] = ()
    """Peers that weren't timed, and why."""
    layers: Mapping[str, Sequence[LayerTime]] = field(default_factory=dict)
    """Variant → where its plan spends its time, the slowest layer first."""
    steering: Mapping[str, Comparison] = field(default_factory=dict)
    """Trace → what became of its requests."""

    @property
    def dense(self) -> str | None:
        """The variant among the rows that removes no tokens."""
        variants = (self.bundle.variant(row.variant) for row in self.rows if not row.peer)
        return next((v.name for v in variants if v.degree == 0), None)

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Backend and precision of our own rows, in their order."""
        return list(dict.fromkeys((r.backend, r.precision) for r in self.rows if not r.peer))

    @property
    def fastest(self) -> tuple[str, str]:
        """Backend and precision of our own rows that take the least time, all rows together."""
        times: dict[tuple[str, str], float] = {}
        for row in self.rows:
            if not row.peer:
                key = (row.backend, row.precision)
                times[key] = times.get(key, 0) + math.log(row.timing.median_ms)
        return min(times, key=lambda key: times[key])

    def macs(self, variant: str) -> int:
        """Multiply-adds per image."""
        return self.bundle.variant(variant).schedule(self.bundle.spec).macs(self.bundle.spec)

    def bound(self, variant: str) -> float:
        """The speed-up over the dense model that multiply-adds alone would give."""
        return Schedule.of(self.bundle.spec, 0).macs(self.bundle.spec) / self.macs(variant)

    def speed_up(self, row: Row) -> float | None:
        """Over the dense variant at the same batch; None where that wasn't timed.

        Of our own rows, over that of the same backend and precision; of peers, over our fastest.
        """
        dense = self._find_dense(row)
        return row.timing.images_per_s / dense.images_per_s if dense else None

    def is_slower(self, row: Row) -> bool:
        """Whether one of our own rows takes longer than the dense variant, beyond all doubt."""
        dense = None if row.peer else self._find_dense(row)
        return dense is not None and dense.is_faster(row.timing)

    def find_rivals(self, kind: tuple[str, str]) -> list[tuple[str, str]]:
        """Backends and precisions of which no row differs by more than what the runs scatter."""
        differ = {
            (other.backend, other.precision)
            for row in self._list_rows(kind)
            for other in self.rows
            if (other.variant, other.timing.batch) == (row.variant, row.timing.batch)
            and (row.timing.is_faster(other.timing) or other.timing.is_faster(row.timing))
        }
        return [other for other in self.kinds if other != kind and other not in differ]

    def describe(self, row: Row) -> dict[str, Any]:
        """A row and what follows from it, unrounded."""
        facts = asdict(row)
        facts |= facts.pop("timing")
        speed_up, macs, bound = self.speed_up(row), None, None
        if not row.peer:
            macs, bound = self.macs(row.variant), self.bound(row.variant)
        of_bound = speed_up / bound if speed_up and bound else None
        return {**facts, "speed_up": speed_up, "macs": macs, "bound": bound, "of_bound": of_bound}

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {
            "bundle": str(self.bundle.path),
            "device": self.device,
            "rows": [self.describe(row) for row in self.rows],
            "not_timed": list(self.not_timed),
            "layers": {
                name: [asdict(layer) for layer in found[:SLOWEST]]
                for name, found in self.layers.items()
            },
            "steering": {name: asdict(found) for name, found in self.steering.items()},
        }

    def steer(self, slo: float, traces: Mapping[str, Arrivals] | None = None) -> Report:
        """The same with what steering would do with the fastest times.

        It picks among the batches that were timed, and so do the variants alone.

        Args:
            slo: latency wanted, seconds.
            traces: name → arrivals; default: :func:`~..serving.arrivals.draw_traces`.
        """
        from ..serving.arrivals import draw_traces
        from ..serving.simulation import compare_steering
        from ..serving.steering import Steering

        batches = sorted({row.timing.batch for row in self.rows})
        speeds = {batch: self._list_speeds(batch, self.fastest) for batch in batches}
        alone = {name: batches[0] / speed for name, speed in speeds[batches[0]].items()}
        seconds = {
            name: {n: n / speeds[n][name] for n in batches if name in speeds[n]} for name in alone
        }
        by_cost = sorted(seconds, key=self.macs, reverse=True)  # times scatter, MACs don't
        steering = Steering(seconds, slo, self.bundle.accuracy, by_cost)
        found = {
            name: compare_steering(steering, arrivals)
            for name, arrivals in (traces or draw_traces(alone)).items()
        }
        return replace(self, steering=found)

    def plot(self, file: Path) -> None:
        """Write :func:`~.plot.draw_speeds` of the fastest rows to a PNG or SVG file.

        Raises:
            MissingPackageError, InputError, OutputError: as drawing and saving do.
        """
        from tocom_export.study.plot_style import save

        from .plot import draw_speeds

        batches = sorted({row.timing.batch for row in self.rows})
        speeds = {batch: self._list_speeds(batch, self.fastest) for batch in batches}
        macs = {name: self.macs(name) for name in speeds[batches[-1]]}
        accuracy = {name: a for name, a in self.bundle.accuracy.items() if name in macs}
        peers = self._list_speeds(batches[-1])
        save(draw_speeds(speeds, macs, accuracy, peers), file)

    def _list_rows(self, kind: tuple[str, str]) -> list[Row]:
        """Our own of one backend and precision."""
        return [r for r in self.rows if not r.peer and (r.backend, r.precision) == kind]

    def _find_dense(self, row: Row) -> Timing | None:
        """Of the dense variant at a row's batch, of its kind; for a peer's, of our fastest."""
        kind = self.fastest if row.peer else (row.backend, row.precision)
        dense, batch = self.dense, row.timing.batch
        found = (
            r.timing for r in self._list_rows(kind) if (r.name, r.timing.batch) == (dense, batch)
        )
        return next(found, None)

    def _list_speeds(self, batch: int, kind: tuple[str, str] | None = None) -> dict[str, float]:
        """Variant → images a second, of one backend and precision; of peers without one."""
        rows = (row for row in self.rows if row.timing.batch == batch)
        return {
            row.name: row.timing.images_per_s
            for row in rows
            if (row.peer if kind is None else (row.backend, row.precision) == kind and not row.peer)
        }

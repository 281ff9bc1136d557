"""What ``bench`` found, as a table, a document and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tocom_export.cli.output import Output, megabytes
from tocom_export.compression.schedule import TokenSchedule

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle

    from ..serving.simulation import Arrivals, Outcome
    from ..tensorrt.trtexec import LayerTime
    from .timing import Timing

SLOWEST = 5
"""Layers of a plan that are named."""
TRACE_SECONDS, TRACE_REQUESTS = 8, 2000
"""Least length of the traces that steering is shown on, in pretended seconds and in requests that
the lowest degree could serve."""
Timings = Mapping[tuple[int, int], "Timing"]
"""(target, batch) → how fast."""


@dataclass(frozen=True)
class Report:
    """All that was measured of one bundle."""

    bundle: Bundle
    runner: str
    timings: Timings
    layers: Mapping[int, Sequence[LayerTime]] = field(default_factory=dict)
    peers: Mapping[tuple[str, int], Timing] = field(default_factory=dict)
    """(name, batch) → how fast."""
    missing: Sequence[str] = ()
    """Peers that weren't timed, and why."""
    memory: Mapping[str, int | None] = field(default_factory=dict)
    """Engine (``r08``) or peer → bytes of a process that runs it alone."""
    steering: Mapping[str, Mapping[str, Outcome]] = field(default_factory=dict)
    """Trace → degree (``r08``) or ``steered`` → what became of its requests."""

    def bound(self, target: int) -> float:
        """What r = 0 costs over this target, multiply-adds alone."""
        costs = [TokenSchedule.of(self.bundle.spec, r) for r in (0, target)]
        dense, reduced = (cost.multiply_adds(self.bundle.spec) for cost in costs)
        return dense / reduced

    def speed_up(self, timing: Timing) -> float | None:
        """Over the engine at degree 0, which the bundle may not have."""
        dense = self.timings.get((0, timing.batch))
        return timing.throughput / dense.throughput if dense else None

    def to_json(self) -> dict[str, Any]:
        """Everything, unrounded."""
        timings = []
        for (target, _), timing in self._ordered():
            speed_up = self.speed_up(timing)
            timings.append(
                {
                    "target": target,
                    **timing.to_json(),
                    "speed_up": speed_up,
                    "bound": self.bound(target),
                    "of_bound": speed_up and speed_up / self.bound(target),
                    "memory": self.memory.get(f"r{target:02d}"),
                }
            )
        peers = [
            {
                "name": name,
                **timing.to_json(),
                "speed_up": self.speed_up(timing),
                "memory": self.memory.get(name),
            }
            for (name, _), timing in self.peers.items()
        ]
        return {
            "bundle": str(self.bundle.path),
            "runner": self.runner,
            "timings": timings,
            "peers": peers,
            "peers_missing": list(self.missing),
            "layers": {
                str(target): [asdict(layer) for layer in found[:SLOWEST]]
                for target, found in self.layers.items()
            },
            "steering": {
                trace: {name: found.to_json() for name, found in outcomes.items()}
                for trace, outcomes in self.steering.items()
            },
        }

    def show(self, output: Output) -> None:
        """The tables, and a word on what they lack."""
        columns = ["", "batch", "median ms", "10 to 90 %", "p99 ms", "images/s", "over r00"]
        columns += ["of bound", "memory"]
        rows = [self._row(f"r{target:02d}", timing, target) for (target, _), timing in
                self._ordered()]  # fmt: skip
        rows += [self._row(name, timing) for (name, _), timing in self.peers.items()]
        output.table(columns, rows, f"{self.bundle.path}, {self.runner}, {self.bundle.precision}")
        for target, found in self.layers.items():
            slowest = [
                [x.name[:60], f"{x.average_ms:.3f}", f"{x.share:.1f} %"] for x in found[:SLOWEST]
            ]
            output.table(["layer", "ms", "share"], slowest, f"r{target:02d}")
        for trace, outcomes in self.steering.items():
            shown = [
                [name, f"{found.met:.1f} %", f"{found.mean_degree:.1f}", f"{found.p50_ms:.1f}",
                 f"{found.p99_ms:.1f}", found.switches]
                for name, found in outcomes.items()
            ]  # fmt: skip
            columns = ["", "in time", "mean degree", "median ms", "p99 ms", "switches"]
            count = next(iter(outcomes.values())).requests
            output.table(columns, shown, f"{trace}, {count} requests, simulated with these times")
        for line in self.missing:
            output.note(f"Not timed: {line}")
        if 0 not in {target for target, _ in self.timings}:
            output.note("No engine at degree 0 was timed to compare with.")
        for (target, batch), timing in self._ordered():
            if (self.speed_up(timing) or 1) < 1:
                output.note(
                    f"r{target:02d} is slower than r00 at batch {batch}: removing tokens pays when "
                    "the batch fills the device."
                )

    def draw(self, file: Path) -> None:
        """Write the picture."""
        from .plot import speed_picture

        engines: dict[int, dict[int, float]] = {}
        for (target, batch), timing in self.timings.items():
            engines.setdefault(batch, {})[target] = timing.throughput
        largest = max(engines)
        peers = {n: t.throughput for (n, batch), t in self.peers.items() if batch == largest}
        accuracy = {t: a for t, a in self.bundle.accuracy.items() if t in engines[largest]}
        speed_picture(engines, accuracy, peers, file)

    def steered(self, slo: float, recorded: Mapping[str, Arrivals]) -> Report:
        """The same with what steering would do with the times at the smallest batch.

        Args:
            slo: latency wanted, seconds.
            recorded: name → arrivals; where it is empty, made ones.
        """
        from ..serving.simulation import TRACES, simulate, synthetic
        from ..serving.steering import Steering

        smallest = min(batch for _, batch in self.timings)
        seconds = {t: x.median_ms / 1000 for (t, b), x in self.timings.items() if b == smallest}
        choices = {"steered": Steering(seconds, slo, self.bundle.accuracy)}
        for target in sorted(seconds):
            fixed = Steering(seconds, slo, floor=target, ceiling=target)
            choices[f"r{target:02d}"] = fixed
        capacity = 1 / seconds[min(seconds)]
        length = max(TRACE_SECONDS, TRACE_REQUESTS / capacity)
        traces = recorded or {shape: synthetic(shape, capacity, length) for shape in TRACES}
        found = {
            name: {choice: simulate(arrivals, how) for choice, how in choices.items()}
            for name, arrivals in traces.items()
        }
        return dataclasses.replace(self, steering=found)

    def _ordered(self) -> list[tuple[tuple[int, int], Timing]]:
        return sorted(self.timings.items(), key=lambda item: item[0][::-1])

    def _row(self, name: str, timing: Timing, target: int | None = None) -> list[object]:
        speed_up, memory = self.speed_up(timing), self.memory.get(name)
        share = None
        if speed_up and target:
            share = speed_up / self.bound(target)
        return [
            name,
            timing.batch,
            f"{timing.median_ms:.2f}",
            f"{timing.low_ms:.2f} to {timing.high_ms:.2f}",
            f"{timing.p99_ms:.2f}",
            f"{timing.throughput:.1f}",
            f"{speed_up:.2f}×" if speed_up else "-",
            f"{100 * share:.0f} %" if share else "-",
            megabytes(memory) if memory else "-",
        ]

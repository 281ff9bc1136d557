"""What a schedule costs: multiply-adds, or milliseconds on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tocom_export.compression.method import Merge
from tocom_export.compression.schedule import Schedule
from tocom_export.model.spec import VitSpec


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of a schedule as a sum over its layers; steers the search, decides nothing.

    A layer costs in proportion to its multiply-adds, linear ones and those of attention apart, and
    one that removes tokens costs something for doing so, and in proportion to those it looks at.
    """

    spec: VitSpec
    shares: tuple[float, ...]
    """Milliseconds of each part of :func:`_describe`, none negative."""

    @classmethod
    def of(cls, spec: VitSpec, measured: Mapping[Schedule, float]) -> LatencyModel:
        """The least-squares fit to measured milliseconds."""
        parts = np.array([_describe(spec, schedule) for schedule in measured])
        times = np.array(list(measured.values()))
        return cls(spec, tuple(_solve(parts / times[:, None], np.ones(len(times))).tolist()))

    def adjust(self, measured: Mapping[Schedule, float], limit: float) -> LatencyModel:
        """The same, made right for the schedule whose milliseconds are nearest to a limit.

        A fit over all is off by some percent at each; at the limit that decides what is allowed.
        """
        near = min(measured, key=lambda schedule: abs(measured[schedule] - limit))
        ratio = measured[near] / self.predict(near)
        return replace(self, shares=tuple(ratio * share for share in self.shares))

    def predict(self, schedule: Schedule) -> float:
        """Milliseconds."""
        return float(np.dot(_describe(self.spec, schedule), self.shares))


def list_probes(spec: VitSpec, merge: Merge = "block") -> list[Schedule]:
    """Schedules to measure for a fit: constants, and steps of several sizes at several places."""
    depth, patches = spec.depth, spec.patches
    lists: list[Sequence[int]] = [[0] * depth]
    lists += [[degree] * depth for degree in (4, 8, 16)]
    for step in (2, 3):
        for share in (6, 3):
            lists.append([patches // share * (layer % step == 1) for layer in range(depth)])
    for place in (0, depth // 2):
        lists.append([patches // 2 * (layer == place) for layer in range(depth)])
    lists.append([patches // 8 if layer < depth // 2 else 1 for layer in range(depth)])
    found = [Schedule.of(spec, degrees, merge) for degrees in lists]
    return list({schedule.removed: schedule for schedule in found}.values())


def _describe(spec: VitSpec, schedule: Schedule) -> list[float]:
    """What the time of a schedule is made of: one, multiply-adds, merges, and what they look at."""
    flat = Schedule.of(spec, 0).macs(spec)
    attention = sum(2 * n * n * spec.width for n in schedule.tokens_in)
    merging = [n for n, r in zip(schedule.tokens_in, schedule.removed, strict=True) if r]
    return [
        1.0,
        (schedule.macs(spec) - attention) / flat,
        attention / flat,
        float(len(merging)),
        sum(merging) / spec.tokens,
        sum(n * n for n in merging) / spec.tokens**2,
    ]


def _solve(
    parts: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Least squares without negative shares: the most negative one is left out, and so on."""
    left = list(range(parts.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(parts[:, left], wanted, rcond=None)
        if found.min() >= 0:
            shares = np.zeros(parts.shape[1])
            shares[left] = found
            return shares
        del left[int(found.argmin())]

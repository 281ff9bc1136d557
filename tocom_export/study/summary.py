"""Rows of an accuracy study → the few numbers that say how it went."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean, stdev
from typing import Any

from .results import Row

LEAST_LOSS = 1.0
"""Points that compression alone must cost a data set for there to be a gap."""
Spread = tuple[float, float | None]
"""A mean over seeds and their sample standard deviation; None with a single seed."""


@dataclass(frozen=True)
class Pair:
    """One pair of degrees, averaged over data sets; the seeds are the sample of each spread."""

    source: int
    target: int
    datasets: tuple[str, ...]
    """Those that have this pair."""
    baseline: Spread
    tocom: Spread | None
    gain: Spread | None
    """ToCom above compression alone; its spread is that of the differences, seed by seed."""
    reference: Spread | None
    throughput: Spread | None


def average_pairs(rows: Iterable[Row]) -> list[Pair]:
    """Rows of one method and one bank by pair of degrees, in rising order.

    A value that one of the pair's data sets lacks is None. Rows of schedules, which have no
    target degree, are passed over, as everywhere here.
    """
    pairs = []
    targeted = group_rows((row for row in rows if row.target is not None), "source", "target")
    for (source, target), own in sorted(targeted.items()):
        datasets = group_rows(own, "dataset")
        baseline = average(datasets.values(), "baseline")
        assert baseline is not None  # every row has one
        names = ("tocom", "gain", "reference", "throughput")
        more = (average(datasets.values(), name) for name in names)
        pairs.append(Pair(source, target, tuple(datasets), baseline, *more))
    return pairs


def group_rows(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """Rows by a field, or by several as a tuple, in the order that each value comes first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(attrgetter(*names)(row), []).append(row)
    return groups


def average(datasets: Collection[Sequence[Row]], name: str) -> Spread | None:
    """Mean of a field over data sets, each given by its rows, and its spread over seeds.

    None where a data set lacks it: an average over the others would compare different ones.
    """
    runs = [
        {row.seed: value for row in rows if (value := getattr(row, name)) is not None}
        for rows in datasets
    ]
    if not all(runs):
        return None
    if any(run.keys() != runs[0].keys() for run in runs):  # no seed is one sample of them all
        return fmean(fmean(run.values()) for run in runs), None
    means = [fmean(run[seed] for run in runs) for seed in sorted(runs[0])]
    return fmean(means), stdev(means) if len(means) > 1 else None


@dataclass(frozen=True)
class GapShare:
    """How much of what compression loses against the trained-for degree comes back."""

    share: float | None
    """None where no data set counts, or where the references gain nothing to compare with."""
    gains: Mapping[str, float]
    """The data sets counted, and what ToCom adds to each, in points."""
    left_out: Mapping[str, str]
    """The others, and why."""

    @property
    def each_gains(self) -> bool:
        """Whether ToCom adds to every data set that counts, of which there is at least one."""
        return bool(self.gains) and all(gain > 0 for gain in self.gains.values())


def measure_gap_share(rows: Iterable[Row]) -> GapShare:
    """Σ (tocom - baseline) / Σ (reference - baseline) at 0 → 16 with ToMe.

    A data set counts where degree 16 alone costs its model at least :data:`LEAST_LOSS` points
    against degree 0, which is the row 0 → 0. Seeds are averaged first; those that lack one of
    the four accuracies are passed over.
    """
    rows = [row for row in rows if row.target is not None]
    # At degree 0 the methods are one and the same.
    whole = {(r.dataset, r.seed): r.baseline for r in rows if r.source == r.target == 0}
    gaps: list[float] = []
    gains: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for dataset, merged in group_rows((r for r in rows if r.method == "tome"), "dataset").items():
        own = _select(merged, 0, 16)
        known = [row for row in own if (dataset, row.seed) in whole]
        complete = [
            (whole[dataset, r.seed], r.baseline, r.tocom, r.reference)
            for r in known
            if r.tocom is not None and r.reference is not None
        ]
        if not complete:
            lacking = "ToCom or the reference" if known else "0 → 0" if own else "0 → 16"
            left_out[dataset] = f"{lacking} is not measured"
            continue
        trained, baseline, tocom, reference = map(fmean, zip(*complete, strict=True))
        loss = round(trained - baseline, 9)  # 80.3 - 79.3 is a whole point
        if loss < LEAST_LOSS:
            left_out[dataset] = f"compression alone costs it {loss:.2f} points"
            continue
        gains[dataset] = tocom - baseline
        gaps.append(reference - baseline)
    share = sum(gains.values()) / sum(gaps) if sum(gaps) > 0 else None
    return GapShare(share, gains, left_out)


UNLABELLED = ("tocom", "local", "searched", "searched_tocom", "searched_local")
"""Fields of what makes up for degree 16 on a model of source 0; none but the first used labels."""


def measure_shares(rows: Iterable[Row]) -> dict[str, float | None]:
    """Field of :data:`UNLABELLED` → Σ (it - baseline) / Σ (reference - baseline) at 0 → 16.

    Over all data sets, those that lose little among them, seeds averaged first; None where a data
    set lacks it, or where the references gain nothing.
    """
    datasets = group_rows(_select(rows, 0, 16), "dataset").values()
    gaps = _sum_gains(datasets, "reference")
    if gaps is None or gaps <= 0:
        return dict.fromkeys(UNLABELLED)
    sums = {name: _sum_gains(datasets, name) for name in UNLABELLED}
    return {name: None if total is None else total / gaps for name, total in sums.items()}


def _sum_gains(datasets: Collection[Sequence[Row]], name: str) -> float | None:
    """Points above compression alone; None where a row lacks them."""
    total = 0.0
    for own in datasets:
        pairs = [(getattr(row, name), row.baseline) for row in own]
        if any(value is None for value, _ in pairs):
            return None
        total += fmean(value - before for value, before in pairs)
    return total if datasets else None


def measure_gains(rows: Iterable[Row], source: int, target: int) -> dict[str, float]:
    """Data set → points that ToCom adds at a pair of degrees with ToMe, seeds averaged."""
    datasets = group_rows(_select(rows, source, target), "dataset").items()
    return {name: gain[0] for name, own in datasets if (gain := average([own], "gain"))}


def _select(rows: Iterable[Row], source: int, target: int) -> list[Row]:
    """A pair of degrees with ToMe and ToCom."""
    wanted = source, target, "tome", "tocom"
    return [row for row in rows if (row.source, row.target, row.method, row.variant) == wanted]


def compare_banks(rows: Iterable[Row], source: int, target: int) -> dict[str, Pair]:
    """The banks of one method at one pair of degrees, each over the runs that all share.

    An average over other runs would tell the data sets apart rather than the banks. Empty where
    they share none; banks without the pair are not in it.
    """
    runs: dict[str, dict[tuple[str, int], Row]] = {}
    for row in rows:
        if (row.source, row.target) == (source, target) and row.tocom is not None:
            runs.setdefault(row.variant, {})[row.dataset, row.seed] = row
    shared = [run for run in next(iter(runs.values()), ()) if all(run in r for r in runs.values())]
    if not shared:
        return {}
    return {bank: average_pairs(own[run] for run in shared)[0] for bank, own in runs.items()}

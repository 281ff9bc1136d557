"""Rows of an accuracy study → the few numbers that say how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .results import Row

Spread = tuple[float, float | None]
"""A mean over seeds and their sample standard deviation; None with a single seed."""


def mean_spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of at least one value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


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
    throughput: float | None


def pairs(rows: Iterable[Row]) -> list[Pair]:
    """Rows of one method and one variant by pair of degrees, in rising order.

    A value that one of the pair's data sets lacks is None: an average over the others would
    compare different data sets with each other.
    """
    grouped: dict[tuple[int, int], dict[str, list[Row]]] = {}
    for row in rows:
        group = grouped.setdefault((row.source, row.target), {})
        group.setdefault(row.dataset, []).append(row)
    return [_pair(*degrees, grouped[degrees]) for degrees in sorted(grouped)]


def _pair(source: int, target: int, groups: Mapping[str, Sequence[Row]]) -> Pair:
    baseline = _averaged(groups, lambda row: row.baseline)
    assert baseline is not None  # every row has one
    throughput = _averaged(groups, lambda row: row.throughput)
    return Pair(
        source,
        target,
        tuple(groups),
        baseline,
        tocom=_averaged(groups, lambda row: row.tocom),
        gain=_averaged(groups, _gain),
        reference=_averaged(groups, lambda row: row.reference),
        throughput=throughput[0] if throughput else None,
    )


def _gain(row: Row) -> float | None:
    return None if row.tocom is None else row.tocom - row.baseline


def _averaged(
    groups: Mapping[str, Sequence[Row]], value: Callable[[Row], float | None]
) -> Spread | None:
    runs = [
        {row.seed: number for row in group if (number := value(row)) is not None}
        for group in groups.values()
    ]
    if not all(runs):
        return None
    if all(run.keys() == runs[0].keys() for run in runs):
        return mean_spread([fmean(run[seed] for run in runs) for seed in sorted(runs[0])])
    return fmean(fmean(run.values()) for run in runs), None  # no seed is one sample of them all


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


def gap_share(
    rows: Iterable[Row],
    source: int = 0,
    target: int = 16,
    least_loss: float = 1.0,
    *,
    method: str = "tome",
    variant: str = "tocom",
) -> GapShare:
    """Σ (tocom - baseline) / Σ (reference - baseline), over the data sets with a gap to close.

    A data set counts where the target degree alone costs its model at least ``least_loss`` points
    against the source degree, which is the row source → source. Seeds are averaged first; those
    that lack one of the four accuracies are passed over.
    """
    rows = list(rows)
    measured = [r for r in rows if (r.source, r.target) == (source, target)]
    measured = [r for r in measured if (r.method, r.variant) == (method, variant)]
    plain = {
        (r.dataset, r.seed): r.baseline
        for r in rows
        if r.source == r.target == source and (r.method == method or source == 0)
    }  # at degree 0 the methods are one and the same
    gained = missing = 0.0
    gains: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for dataset in dict.fromkeys(r.dataset for r in rows if r.method == method):
        own = [r for r in measured if r.dataset == dataset]
        known = [r for r in own if (dataset, r.seed) in plain]
        complete = [
            (plain[dataset, r.seed], r.baseline, r.tocom, r.reference)
            for r in known
            if r.tocom is not None and r.reference is not None
        ]
        if not complete:
            lacking = f"{source} → {target}" if not own else f"{source} → {source}"
            lacking = "ToCom or the reference" if known else lacking
            left_out[dataset] = f"{lacking} is not measured"
            continue
        whole, baseline, tocom, reference = map(fmean, zip(*complete, strict=True))
        loss = round(whole - baseline, 9)  # 80.3 - 79.3 is a whole point
        if loss < least_loss:
            left_out[dataset] = f"compression alone costs it {loss:.2f} points"
            continue
        gains[dataset] = tocom - baseline
        gained += tocom - baseline
        missing += reference - baseline
    return GapShare(gained / missing if missing > 0 else None, gains, left_out)


def sum_of_gains(
    rows: Iterable[Row], source: int, target: int, *, method: str = "tome", variant: str = "tocom"
) -> float | None:
    """Points that ToCom adds at one pair of degrees, seeds averaged, summed over the data sets.

    None where no data set has the pair with ToCom.
    """
    gains: dict[str, list[float]] = {}
    for row in rows:
        key = (row.source, row.target, row.method, row.variant)
        if key == (source, target, method, variant) and (gain := _gain(row)) is not None:
            gains.setdefault(row.dataset, []).append(gain)
    return sum(map(fmean, gains.values())) if gains else None


def compared(rows: Iterable[Row], source: int, target: int) -> dict[str, Pair]:
    """The variants of one method at one pair of degrees, each over the runs that all share.

    A run is a data set and a seed: an average over others would tell the data sets apart rather
    than the variants. Empty where they share none; variants without the pair are not in it.
    """
    runs: dict[str, dict[tuple[str, int], Row]] = {}
    for row in rows:
        if (row.source, row.target) == (source, target) and row.tocom is not None:
            runs.setdefault(row.variant, {})[row.dataset, row.seed] = row
    shared = [run for run in next(iter(runs.values()), ()) if all(run in r for r in runs.values())]
    if not shared:
        return {}
    return {variant: pairs(own[run] for run in shared)[0] for variant, own in runs.items()}

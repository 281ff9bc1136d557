"""From what was measured to the rows of a study, and to the manifests of bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..bundle.opening import Bundle
from ..compression.schedule import MAX_DEGREE
from ..errors import BundleError, InputError
from ..io.locking import hear_nothing, hold
from ..variant import constant_name
from .evaluate import Measured
from .results import Results, Row
from .subject import Subject


def make_rows(
    measured: Sequence[Measured],
    name: str,
    bank_name: str,
    seed: int,
    neighbours: int | None = None,
    knn: str = "",
) -> list[Row]:
    """Rows of a study, those of models that were trained at a target degree in place.

    Args:
        name: what to call the data set.
        bank_name: what to call the bank.
        seed: that of training.
        neighbours: how many voted on each image; None where heads named the classes.
        knn: what to call the images that they are of.
    """
    rows = []
    for found in measured:
        variant, degree = found.variant, found.variant.degrees[0]
        by_degree = variant.name == constant_name(variant.degrees) and degree <= MAX_DEGREE
        row = Row(
            dataset=name,
            method=found.subject.method.label,
            source=variant.source,
            target=degree if by_degree else None,
            baseline=found.plain.accuracy,
            # At its source degree a model is what it is without a bank.
            tocom=found.served.accuracy if variant.compensated else None,
            reference=None,
            seed=seed,
            scale=variant.scale if found.compensated else None,
            unlabelled_scale=found.unlabelled and found.unlabelled[0],
            unlabelled=found.unlabelled and found.unlabelled[1].accuracy,
            variant=bank_name,
            images=found.plain.total,
            throughput=found.plain.throughput,  # compensation is in the weights and costs none
            model=found.subject.path.name,
            schedule="" if by_degree else variant.name,
            neighbours=neighbours,
            knn=knn,
        )
        rows.append(row)
    return list(Results(tuple(rows)).merge().rows)


def check_conflicts(
    subjects: Sequence[Subject],
    name: str,
    bank_name: str,
    seed: int,
    known: Sequence[Row] = (),
    neighbours: int | None = None,
    knn: str = "",
) -> None:
    """Raise InputError where two models would have the same rows, before anything is measured.

    Args:
        known: rows that the new ones are added to; those of the same model are replaced. The
            others are as :func:`make_rows` has them.
    """
    owners: dict[tuple[str, int], Path | str] = {
        (row.method, row.source): row.model
        for row in known
        if row.model
        and (row.dataset, row.variant, row.seed, row.neighbours, row.knn)
        == (name, bank_name, seed, neighbours, knn)
    }
    for subject in subjects:
        path = subject.path
        for source in sorted({variant.source for variant in subject.variants}):
            owner = owners.get((subject.method.label, source), path)
            if owner not in (path, path.name):
                raise InputError(
                    f"{path} and {owner} are both of source {source} and seed {seed} on {name}, "
                    "and would share their rows; tell them apart by `bank_name`, `seed` or "
                    "`name`, in a run for each."
                )
            owners[subject.method.label, source] = path


def check_recordable(
    paths: Iterable[Path], *, wait: bool = True, tell: Callable[[str], None] = hear_nothing
) -> None:
    """Raise OutputError where :func:`record_accuracy` would, before anything is measured."""
    for path in paths:
        if path.is_dir():
            with hold(path.resolve(), wait=wait, tell=tell):
                pass


def record_accuracy(
    measured: Sequence[Measured],
    *,
    wait: bool = True,
    tell: Callable[[str], None] = hear_nothing,
) -> dict[Path, list[str]]:
    """Write each bundle's accuracies into its manifest, beside those of its other variants.

    Args:
        wait: for another that writes a bundle.
        tell: called with a line for people before it waits.

    Returns:
        Each bundle that was written, and the variants that were measured.

    Raises:
        BundleError: a bundle is no longer what was measured.
        BusyError, OutputError: another writes a bundle, or it can't be written.
    """
    recorded = {}
    for path in dict.fromkeys(found.subject.path for found in measured if found.subject.baked):
        of_it = [m for m in measured if m.subject.path == path]
        with hold(path.resolve(), wait=wait, tell=tell):
            bundle = Bundle.open(path)
            if any(found.subject.files != bundle.files for found in of_it):
                raise BundleError(
                    f"{path} was refitted or built again while it was measured; its accuracy was "
                    "not recorded. Evaluate it again."
                )
            own = {m.variant.name: m.served.accuracy for m in of_it}
            known = {**bundle.accuracy, **own}
            accuracy = {name: known[name] for name in bundle.variants if name in known}
            replace(bundle, accuracy=accuracy).save_manifest()
        recorded[path] = list(own)
    return recorded

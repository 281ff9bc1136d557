"""Engines run on labelled images, beside the model that they are of."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from tocom_export.bundle.opening import Bundle
from tocom_export.study.accuracy import Run, measure_accuracy
from tocom_export.study.subject import Batches, Oracle, check_classes

from .engine import Backend, Engine, Images, Logits
from .opening import open_engine
from .verify import AccuracyCheck, find_precision

if TYPE_CHECKING:
    from tocom_export.export_checks import Progress


def verify_accuracy(
    bundle: Bundle,
    data: Batches,
    oracle: Oracle,
    engines: Iterable[tuple[str, Backend]],
    *,
    progress: Progress = lambda title, steps: nullcontext(lambda step: None),
    **options: Any,
) -> list[AccuracyCheck]:
    """The accuracy of a bundle's engines on labelled images, beside the model's.

    Args:
        engines: variants by name or bare degree, each on a backend.
        options: of :func:`~tocom_export.engines.opening.open_engine`.

    Raises:
        DataError: the images have other classes than the bundle.
        TocomError: what opening an engine raises.
    """
    names = f"`data` {data.name}"
    check_classes(data.classes, names, bundle.spec, bundle.classes, bundle.path)
    chosen = [(bundle.variant(name), backend) for name, backend in engines]
    opened = [open_engine(bundle, v, backend=b, **options) for v, b in chosen]
    runs = [run_in_parts(engine) for engine in opened]
    models = {variant.name: oracle.runner(variant) for variant, _ in chosen}
    with progress("measuring accuracy", len(data)) as advance:
        scores = measure_accuracy([*runs, *models.values()], data, lambda _: advance(""))
    known = dict(zip(models, scores[len(runs) :], strict=True))
    precisions = [find_precision(engine, bundle.precision) for engine in opened]
    return [
        AccuracyCheck(v.name, precision, b, score, known[v.name], oracle.stored_as(v))
        for (v, b), precision, score in zip(chosen, precisions, scores[: len(runs)], strict=True)
    ]


def run_in_parts(engine: Engine) -> Run:
    """An engine's run of any number of images, in batches that it takes."""
    largest = engine.largest
    if largest is None:
        return engine.run

    def run(images: Images) -> Logits:
        starts = range(0, len(images), largest)
        return np.concatenate([engine.run(images[i : i + largest]) for i in starts])

    return run

"""Variants for some budgets, found and added to a bundle: what ``tocom-export tune`` calls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tocom_export.bundle.extending import add_variants
from tocom_export.bundle.manifest import MANIFEST, WEIGHTS
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights, recover_checkpoint
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.errors import ImageError, InputError
from tocom_export.export_checks import GRAPH_BACKENDS
from tocom_export.io.locking import hear_nothing
from tocom_export.model.preprocess import choose_spread, find_images
from tocom_export.refitting import choose_bank

from ..engine import Images
from ..picking import resolve
from .budget import Budget, Found
from .journal import Journal
from .trial import open_workshop
from .tune import Progress, Tuner


def tune_bundle(
    path: Path,
    images: Path,
    budgets: Sequence[Budget],
    *,
    name: str | None = None,
    bank: ToComBank | Path | str | None = None,
    scales: bool = False,
    labelled: bool = False,
    limit: int = 512,
    trials: int = 200,
    seed: int = 0,
    batch: int = 1,
    wait: bool = True,
    progress: Progress | None = None,
    tell: Callable[[str], None] = hear_nothing,
    **engine: Any,
) -> list[Found]:
    """Find a variant for each budget and add them to the bundle.

    Args:
        images: a folder of pictures; where they are labelled, of a folder for each class.
        name: of the variant, where there is one budget.
        bank: what the bundle is compensated with; default: as of a refit.
        scales: choose the bank's scale, too.
        limit: pictures at the most.
        batch: images in a run that is timed.
        engine: backend and the like, as of :func:`~tocom_export.engines.opening.open_engine`.

    Raises:
        TocomError: the bundle or the pictures can't be used, or a budget can't be met.
    """
    bundle = Bundle.open(path, hashes=True)
    asked = engine.get("inference_precision", "auto")
    # Once, by the bundle: what was picked for it isn't known of a candidate.
    backend, precision = resolve(bundle, engine.get("backend", "auto"), engine.get("device"), asked)
    if backend not in GRAPH_BACKENDS:
        raise InputError(f"`backend` {backend}: candidates are graphs; name onnx or openvino.")
    engine = {**engine, "backend": backend, "inference_precision": precision}
    weights = find_weights(bundle, bank)
    files = choose_spread(find_images(images), limit)
    labels = _read_labels(files, images, bundle) if labelled else None
    batches = bundle.preprocess.load_batch(files, bundle.spec.image_size)
    journal = Journal(
        path.with_name(f"{path.name}.tune.jsonl"),
        [
            _digest(bundle, batches), labels and list(labels), str(engine), batch, trials, seed,
            weights.bank.sha256 if weights.bank else None,
        ],
    )  # fmt: skip
    if journal.count:
        tell(f"Going on with {journal.count} results in {journal.file}.")
    given = {"progress": progress} if progress else {}
    with open_workshop(bundle, weights, **engine) as workshop:
        tuner = Tuner(
            workshop,
            batches,
            journal,
            batch=batch,
            labels=labels,
            trials=trials,
            seed=seed,
            **given,
        )
        found = [tuner.tune(budget, name, scales) for budget in budgets]
    names = [one.variant.name for one in found]
    if twice := [n for n in names if names.count(n) > 1]:
        raise InputError(f"{twice[0]} is asked for twice; leave one out.")
    add_variants(path, weights, [one.variant for one in found], wait=wait, tell=tell)
    journal.remove()
    return found


def find_weights(bundle: Bundle, bank: ToComBank | Path | str | None) -> ModelWeights:
    """What a bundle was made of.

    Raises:
        BankError: its bank must be named, or is another than the bundle's.
    """
    own = Checkpoint.open(bundle.path / WEIGHTS)
    steps = choose_bank(bundle, list(bundle.variants.values()), bank)
    if steps is not None and bundle.bank not in (None, steps.sha256):
        raise InputError(f"`bank`: {bundle.path} was compensated with another one.")
    opened = recover_checkpoint(own, bundle.spec, bundle.precision)
    return ModelWeights(bundle.spec, opened, steps, bundle.precision)


def _read_labels(files: Sequence[Path], folder: Path, bundle: Bundle) -> list[int]:
    """The class of each picture, by the folder it lies in, in the order of the classes' names."""
    names = sorted({file.relative_to(folder).parts[0] for file in find_images(folder)})
    if len(names) != bundle.spec.classes:
        raise ImageError(
            f"`images` {folder} has {len(names)} folders of classes; the model has "
            f"{bundle.spec.classes} classes."
        )
    return [names.index(file.relative_to(folder).parts[0]) for file in files]


def _digest(bundle: Bundle, images: Images) -> str:
    """Of the pictures and of what is searched: another bundle begins anew."""
    found = hashlib.sha256((bundle.path / MANIFEST).read_bytes())
    found.update(np.ascontiguousarray(images).data)
    return found.hexdigest()

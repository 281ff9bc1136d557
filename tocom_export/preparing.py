"""From what a user asks for to all that a bundle is made of, checked; nothing is written yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .bundle.weights import ModelWeights
from .bundle.writing import Blueprint
from .compensation import load_compensation
from .compression.bank import ToComBank
from .compression.method import Merge, Method
from .compression.rules import list_degrees
from .errors import InputError
from .export_checks import Tell
from .graph.precision import TYPES, Precision
from .loading import load_model
from .model.catalogue import REFERENCE_ACCURACY, REFERENCE_BANKS, REFERENCE_CHECKPOINT
from .model.class_names import read_classes
from .model.outputs import check_method, choose_outputs
from .model.spec import Pool
from .model.statistics import choose_statistics
from .variant import Variant

TARGETS = (0, 4, 8, 12, 16)


def prepare(
    model: str | Any | None = None,
    checkpoint: Path | str | None = None,
    targets: Iterable[int] = TARGETS,
    schedules: Mapping[str, Sequence[int] | str] | None = None,
    source: int | None = None,
    bank: ToComBank | Path | str | None = None,
    scale: float = 0.1,
    method: str | None = None,
    proportional: bool | None = None,
    precision: Precision = "fp32",
    *,
    merge: Merge | None = None,
    weights_key: str | None = None,
    image_size: tuple[int, int] | int | None = None,
    pool: Pool | None = None,
    classes: Sequence[str] | Path | str | None = None,
    outputs: Iterable[str] | str = (),
    unit_embedding: bool = False,
    tell: Tell = lambda _: None,
    **statistics: Any,
) -> Blueprint:
    """What :func:`~tocom_export.exporting.export` would write, all of it checked; writes nothing.

    Args:
        tell: called with lines that a person would want to know: which weights, which statistics.
        statistics: those of :func:`~tocom_export.model.statistics.choose_statistics` to change.
    """
    if precision not in TYPES:
        raise InputError(f"`precision` {precision!r}: it is {', '.join(TYPES)}.")
    form: dict[str, Any] = {"image_size": image_size, "pool": pool}
    loaded = load_model(model, checkpoint, weights_key=weights_key, **form)
    spec, info, origin = loaded.spec, loaded.checkpoint.info, loaded.preprocess_from
    given = choose_outputs(spec, outputs)
    if unit_embedding and "embedding" not in given:
        raise InputError("`unit_embedding` is of embeddings; ask for that among the `outputs`.")
    preprocess, told = choose_statistics(loaded.preprocess, origin, spec.channels, **statistics)
    names = info.classes if classes is None else read_classes(classes, spec.classes)
    trained = loaded.checkpoint.choose_source(source)
    steps, chosen = load_compensation(bank, spec, info, method, proportional, merge)
    check_method(given, chosen)
    make = partial(
        Variant.of, spec, source=trained, scale=scale, compensated=steps is not None,
        merge=chosen.merge,
    )  # fmt: skip
    variants: dict[str, Variant] = {}
    named: list[tuple[str | None, Any]] = [(None, degree) for degree in targets]
    for name, asked in [*named, *(schedules or {}).items()]:
        try:
            variant = make(asked if name is None else list_degrees(spec, asked, chosen.merge), name)
        except InputError as error:
            asked_by = f"`schedules` {name}" if name else "`targets`"
            raise type(error)(f"{asked_by}: {error}") from None
        if variant.name.lower() in map(str.lower, variants):  # some file systems don't tell them
            raise InputError(f"{variant.name} is asked for twice; choose another name.")
        variants[variant.name] = variant
    if not variants:
        raise InputError("no variant: name a degree in `targets`, or a schedule.")
    weights = ModelWeights(spec, loaded.checkpoint, steps, precision)
    for line in filter(None, (loaded.checkpoint.note, loaded.resampled, told)):
        tell(line)
    own_bank = bank in (None, REFERENCE_BANKS[chosen.name])
    shipped = loaded.checkpoint.file == REFERENCE_CHECKPOINT and own_bank
    same = (preprocess, names) == (loaded.preprocess, info.classes)
    known = shipped and same and precision == "fp32" and "logits" in given
    known = known and not loaded.resampled
    accuracy = _look_up_accuracy(variants.values(), chosen) if known else {}
    return Blueprint(weights, chosen, variants, preprocess, names, accuracy, given, unit_embedding)


def _look_up_accuracy(variants: Iterable[Variant], method: Method) -> dict[str, float]:
    """Of the reference model's variants those whose accuracy was measured."""
    usual = method.proportional or method.name == "evit"
    measured = REFERENCE_ACCURACY[method.name] if usual else {}
    return {
        variant.name: measured[variant.degree]
        for variant in variants
        if variant.degree in measured and (variant.source, variant.scale) == (0, 0.1)
    }


def default_out(blueprint: Blueprint) -> Path:
    """The folder of a bundle that isn't told another."""
    source = next(iter(blueprint.variants.values())).source
    return Path(f"{blueprint.weights.spec.model}-source{source}")

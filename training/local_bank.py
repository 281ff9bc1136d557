"""What a bank begins with and is distilled for: all pairs of degrees, or what one model needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tocom_export.bundle.opening import Bundle
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.bank_groups import Arithmetic
from tocom_export.compression.method import Merge, Method
from tocom_export.compression.schedule import MAX_DEGREE, Schedule
from tocom_export.errors import InputError
from tocom_export.model.spec import VitSpec

from .distill import Draw, draw_degrees, draw_from
from .lora import TrainableBank
from .settings import LOCAL_STEPS, Settings

ZERO = "zero"
"""In place of a bank that a local one begins with."""


def load_start(start: str | None) -> ToComBank | None:
    """The bank to begin with, if it is one; raises BankError where it can't be read."""
    return None if start in (None, ZERO) else ToComBank.load(start)


def make_bank(
    spec: VitSpec,
    method: Method,
    start: ToComBank | None,
    *,
    rank: int | None,
    arithmetic: Arithmetic | None,
    scale: float,
) -> TrainableBank:
    """A bank that changes nothing yet, or one to go on with.

    Args:
        rank: of each step; None for that of ``start``, or 2. Likewise ``arithmetic``, "steps".

    Raises:
        BankError: ``start`` doesn't fit the model or the method.
        InputError: ``start`` has another rank or arithmetic.
    """
    if start is None:
        arithmetic, rank = arithmetic or "steps", rank or 2
        rank *= MAX_DEGREE if arithmetic == "shared" else 1
        return TrainableBank(spec, method, rank=rank, scale=scale, arithmetic=arithmetic)
    start.check(spec, method, "`from`")
    for name, given, has in (
        ("rank", rank, start.rank),
        ("arithmetic", arithmetic, start.arithmetic),
    ):
        if given not in (None, has):
            raise InputError(f"`{name}` {given}: the bank of `from` has {has}; leave it out.")
    return TrainableBank.from_bank(start, spec, scale)


def fit_epochs(settings: Settings, steps: int) -> Settings:
    """As many epochs of so many steps as come closest to what a local bank needs."""
    return replace(settings, epochs=max(1, round(LOCAL_STEPS / steps)))


def plan_degrees(
    spec: VitSpec,
    source: int,
    local: bool,
    schedules: Path | None,
    merge: Merge = "block",
) -> tuple[Draw, dict[str, object]]:
    """What is distilled for, and how a run says that it is no other's, as JSON.

    Args:
        source: the degree that the model was trained at.
        local: whether from there alone; else between all pairs of degrees.
        schedules: a bundle, for whose variants alone.
        merge: what merged tokens are spared.

    Raises:
        BundleError: it is no bundle.
        InputError: it is of a model of another shape, or has nothing to compensate for.
    """
    if schedules is None and not local:
        return draw_degrees, {}
    if schedules is None:
        listed = [Schedule.of(spec, degree, merge) for degree in range(MAX_DEGREE + 1)]
    else:
        listed = _list_schedules(schedules, spec, merge)
    about: dict[str, object] = {
        "distilled-for": [source, [list(schedule.degrees) for schedule in listed]]
    }
    return draw_from(source, listed), about


def _list_schedules(place: Path, spec: VitSpec, merge: Merge) -> list[Schedule]:
    bundle = Bundle.open(place)
    for name in ("tokens", "prefix", "depth"):
        ours, theirs = getattr(spec, name), getattr(bundle.spec, name)
        if ours != theirs:
            raise InputError(
                f"`schedules` {place}: its model has {name} {theirs}, {spec.model} has {ours}; "
                "give a bundle of the model that the bank is for."
            )
    if bundle.method.merge != merge:
        raise InputError(
            f"`schedules` {place}: its `merge` is {bundle.method.merge}, the bank's is {merge}; "
            "they have to be the same."
        )
    found = {variant.degrees for variant in bundle.variants.values()}
    return [Schedule.of(spec, degrees, merge) for degrees in sorted(found)]

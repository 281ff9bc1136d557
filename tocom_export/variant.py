"""The noun of this project: one way to run a model, of one cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from .compression.method import Merge
from .compression.schedule import MAX_DEGREE, Degree, Schedule
from .errors import DegreeError, InputError
from .io.json_codec import LATER
from .model.spec import Count, VitSpec

MAX_SCALE = 1000.0
"""Of a bank's gap; the paper tries 0.01 to 1."""
_NAME = re.compile(r"[A-Za-z][\w-]{0,63}", re.ASCII)
_CONSTANT = re.compile(r"r\d\d", re.ASCII)
"""Names of a degree for all layers."""
_LONGER = re.compile(r"r[1-9]\d{2,6}", re.ASCII)
"""The same of more digits; in earlier bundles schedules may be called so."""
_RESERVED = ("weights", "manifest")
"""Names of other files in a bundle."""


@dataclass(frozen=True)
class Variant:
    """A model run at some degrees, with weights that are compensated for them or not.

    Raises:
        DegreeError, InputError: the name can't be a file's, or a number is out of range.
    """

    name: str
    """``r08`` for degree 8 in each layer, or a name of the user's; its files are called so."""
    degrees: tuple[Count, ...]
    """What each layer removes, as far as ToMe's bound lets it."""
    targets: tuple[Annotated[float, Meta(ge=0, le=MAX_DEGREE)], ...]
    """The degree that each layer is compensated for (:attr:`Schedule.targets`)."""
    source: Degree
    """The degree that the weights were trained at."""
    scale: float
    """What the bank's gap from source to target is multiplied by."""
    compensated: bool
    """Whether a bank's gap is added to the weights, as far as there is one."""
    merge: Merge = field(default="block", metadata=LATER)
    """That of its method, on which its tokens and targets depend."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name.lower() in _RESERVED:
            raise InputError(
                f"{self.name!r} can't name a variant: a letter first, then letters, digits, '-' "
                f"and '_', 64 at most, and not {' or '.join(_RESERVED)}."
            )
        _reserve(_CONSTANT, self.name, self.degrees)
        if self.source not in range(MAX_DEGREE + 1):
            raise DegreeError(f"`source` {self.source}: 0 to {MAX_DEGREE} is expected.")
        if not 0 <= self.scale <= MAX_SCALE:
            raise InputError(f"`scale` {self.scale:g}: 0 to {MAX_SCALE:g} is expected.")
        if len(self.targets) != len(self.degrees):
            raise InputError(f"{self.name}: a degree and a target are needed for each layer.")

    @classmethod
    def of(
        cls,
        spec: VitSpec,
        degree: int | Sequence[int],
        name: str | None = None,
        *,
        source: int = 0,
        scale: float = 0.1,
        compensated: bool = True,
        merge: Merge = "block",
    ) -> Variant:
        """The variant of one degree for all layers, or of one degree per layer.

        Args:
            name: needed where the degrees differ; else ``r08``, ``r16``, ``r100``, ...

        Raises:
            DegreeError: a degree is out of range; one for all layers is compensated and more than
                16, which no bank spans; a list is of another length than the model's depth.
            InputError: the name can't be a file's.
        """
        schedule = Schedule.of(spec, degree, merge)
        if compensated and not isinstance(degree, Sequence) and degree > MAX_DEGREE:
            raise DegreeError(
                f"degree {degree}: a bank compensates degrees 0..{MAX_DEGREE}; go without one "
                f"(`bank` none), or list it for each layer (`schedules` NAME={degree},{degree},…), "
                f"which is compensated as for {MAX_DEGREE}."
            )
        name = constant_name(schedule.degrees) if name is None else name
        if name is None:
            raise InputError("a schedule with another degree in each layer needs a name.")
        _reserve(_LONGER, name, schedule.degrees)
        return cls(name, schedule.degrees, schedule.targets, source, scale, compensated, merge)

    @property
    def degree(self) -> int | None:
        """The degree of all layers; None where they differ."""
        return self.degrees[0] if len(set(self.degrees)) == 1 else None

    @property
    def baked(self) -> bool:
        """Whether its weights are others than the checkpoint's: there is a gap to add."""
        return self.compensated and any(target != self.source for target in self.targets)

    @property
    def label(self) -> str:
        """Its degrees for people: ``8``, or ``20,17,11,6,1,3``."""
        return ",".join(map(str, self.degrees if self.degree is None else (self.degree,)))

    def schedule(self, spec: VitSpec) -> Schedule:
        """Its tokens in each layer of a model."""
        return Schedule.of(spec, self.degrees, self.merge)

    def check(self, spec: VitSpec) -> None:
        """Raise InputError where it is no variant of a model: its targets follow from the rest."""
        if self.targets != self.schedule(spec).targets:
            raise InputError(f"{self.name}: its targets are not those of its degrees.")


def constant_name(degrees: Sequence[int]) -> str | None:
    """``r08`` of degree 8 in each layer, ``r100`` of 100; None of degrees that differ."""
    return f"r{degrees[0]:02d}" if len(set(degrees)) == 1 else None


def _reserve(names: re.Pattern[str], name: str, degrees: Sequence[int]) -> None:
    """Raise InputError where a name is one of those, and so that of other degrees."""
    if names.fullmatch(name) and name != constant_name(degrees):
        raise InputError(
            f"{name} is the name of degree {int(name[1:])} in each layer; choose another."
        )


def find_variant(variants: Mapping[str, Variant], name: str | int, where: object) -> Variant:
    """The variant of a name, or of a bare degree: ``8`` is ``r08``.

    Args:
        where: what has the variants, for the message.

    Raises:
        DegreeError: there is none; says which there are.
    """
    text = str(name)
    if text.isdecimal() and len(text) < 9:
        text = f"r{int(text):02d}"
    if text not in variants:
        raise DegreeError(f"{where} has no variant {name}; it has {', '.join(variants)}.")
    return variants[text]

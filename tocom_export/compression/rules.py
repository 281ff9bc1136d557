"""Schedules by a rule that a text names, whatever the model."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DegreeError
from ..model.spec import VitSpec
from .keeping import Keep
from .method import Merge
from .seldom import Every

_RULES: dict[str, type[Every] | type[Keep]] = {"every": Every, "keep": Keep}


def is_rule(text: str) -> bool:
    """Whether a text is meant for a rule."""
    return text.startswith(tuple(_RULES))


def parse_rule(text: str) -> Every | Keep:
    """The rule that a text names.

    Raises:
        DegreeError: it names none; says what one looks like.
    """
    kind = next((kind for name, kind in _RULES.items() if text.startswith(name)), None)
    if kind is None:
        raise DegreeError(f"{text!r} is no rule; write every:K, every:K:R or keep:SHARE.")
    return kind.parse(text)


def list_degrees(
    spec: VitSpec, schedule: Sequence[int] | str, merge: Merge = "block"
) -> Sequence[int]:
    """A schedule's degrees, one a layer; a text is a rule (:class:`Every`, :class:`Keep`).

    Raises:
        DegreeError: the text is no rule, or it can't be had of the model.
    """
    if not isinstance(schedule, str):
        return schedule
    rule = parse_rule(schedule)
    if merge == "ffn":
        raise DegreeError(
            f"{schedule} is for merges that later layers begin with; with `merge` ffn list a "
            "degree for each layer."
        )
    return rule.list_degrees(spec)

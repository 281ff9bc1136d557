"""From what a user names to a bank, and to the method that it and the weights ask for."""

from __future__ import annotations

from pathlib import Path

from .compression.bank import ToComBank
from .compression.metadata import ModelInfo
from .compression.method import Merge, Method
from .errors import BankError
from .model.catalogue import REFERENCE, REFERENCE_BANKS
from .model.spec import VitSpec


def load_bank(
    bank: ToComBank | Path | str | None, spec: VitSpec, method: Method
) -> ToComBank | None:
    """The bank that is asked for, once it fits the model and the method; None for ``none``.

    Args:
        bank: a bank or its file; ``none`` for no compensation; default: of the model inside the
            package its own.

    Raises:
        BankError: none was given and the model has none of its own, or it doesn't fit.
    """
    opened = _open_bank(bank, spec, method.name)
    if opened is not None:
        opened.check(spec, method, _origin(bank))
    return opened


def load_compensation(
    bank: ToComBank | Path | str | None,
    spec: VitSpec,
    info: ModelInfo,
    method: str | None = None,
    proportional: bool | None = None,
    merge: Merge | None = None,
) -> tuple[ToComBank | None, Method]:
    """A bank as :func:`load_bank` has it, and the method that it and the checkpoint ask for."""
    name = choose_method(method, None, info, merge=merge).name
    opened = _open_bank(bank, spec, name)
    chosen = choose_method(method, opened, info, proportional, merge)
    if opened is not None:
        opened.check(spec, chosen, _origin(bank))
    return opened, chosen


def _open_bank(bank: ToComBank | Path | str | None, spec: VitSpec, method: str) -> ToComBank | None:
    if bank == "none" or isinstance(bank, ToComBank):
        return bank if isinstance(bank, ToComBank) else None
    if bank is None and spec.model != REFERENCE:
        raise BankError(
            f"`bank`: {spec.model} has no bank of its own; give a file (tocom-export train makes "
            "one), or 'none' to go without."
        )
    return ToComBank.load(bank or REFERENCE_BANKS[method])


def _origin(bank: ToComBank | Path | str | None) -> str:
    """What to call a bank in a message."""
    if isinstance(bank, ToComBank):
        return "`bank`"
    return f"`bank` {bank or 'of the package'}"


def choose_method(
    name: str | None,
    bank: ToComBank | None,
    info: ModelInfo,
    proportional: bool | None = None,
    merge: Merge | None = None,
) -> Method:
    """The method that is asked for, else the bank's, else the checkpoint's, else ToMe.

    Whether attention is proportional follows the argument, then the checkpoint, then the bank. What
    merging spares follows as the method does.

    Raises:
        InputError: pruning that is to give tokens back.
    """
    known = [m for m in (info.method, bank and bank.method) if m]
    if name is None:
        name = bank.method.name if bank else known[0].name if known else "tome"
    if merge is None:
        first = bank.method if bank else known[0] if known else None
        merge = first.merge if first and first.name == name else "block"
    if proportional is None:
        same = (m.proportional for m in known if (m.name, m.merge) == (name, merge))
        proportional = next(same, True)
    return Method(name, proportional, merge)  # type: ignore[arg-type]

"""What a request is told that isn't answered: a status, a line, and no path of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tocom_export.errors import BundleError, InputError, MissingPackageError, PoolError, TocomError

CLOSE: Mapping[str, str] = {"Connection": "close"}
SOON: Mapping[str, str] = {"Retry-After": "1"}
"""Of what was refused for want of room, which there may be again in a second."""

_PATH = re.compile(
    r"""(?<![\w.:/\\])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:,;'"()]+[/\\])*([^\s/\\:,;'"()]*)"""
)


class Refusal(Exception):
    """An answer without a result.

    Args:
        status: of HTTP.
        text: one line, for whoever asked.
        headers: that go with the answer.
    """

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, dict(headers or {})
        self.counted = False
        """Whether it is among a model's failures by now."""


class Gone(Exception):
    """Who asked has left: nothing is to be answered.

    Args:
        counted: the model has run, or is running, and counts it.
    """

    def __init__(self, *, counted: bool = False) -> None:
        super().__init__()
        self.counted = counted


def refuse(error: TocomError, names: Mapping[str, str] | None = None) -> Refusal:
    """What one of the package's errors is over HTTP.

    Args:
        names: paths that may stand in its text → what to say instead.
    """
    text = hide_paths(str(error), names or {}).replace("`", "'")
    if isinstance(error, PoolError):
        return Refusal(409, text)
    if isinstance(error, (BundleError, MissingPackageError)) or not isinstance(error, InputError):
        return Refusal(500, text)
    return Refusal(400, text)


def hide_paths(text: str, names: Mapping[str, str]) -> str:
    """A message without the folders of this machine: of a path, its last part is left."""
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return _PATH.sub(r"\1", text)

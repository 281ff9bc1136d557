"""The names of a model's classes, from a file or a list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..io.json_codec import decode, parse_json

_LARGEST = 20_000_000  # bytes


def read_classes(classes: Sequence[str] | Path | str, count: int) -> tuple[str, ...]:
    """The name of each class.

    Args:
        classes: the names, or a UTF-8 file of them: one a line, a JSON list, or a JSON object
            from index to name, as Hugging Face's ``id2label``.
        count: how many the model's head has.

    Raises:
        InputError: the file can't be read, or doesn't name that many classes.
    """
    named = isinstance(classes, (str, Path))
    names = _read_file(Path(classes)) if isinstance(classes, (str, Path)) else tuple(classes)
    what = f"`classes` {classes}" if named else "`classes`"
    if len(names) != count:
        head = f"the head has {count}" if count else "the model has no head"
        raise InputError(f"{what} names {len(names)} classes, but {head}.")
    return names


def _read_file(file: Path) -> tuple[str, ...]:
    try:
        if file.stat().st_size > _LARGEST:
            raise InputError(f"`classes` {file} is too large for a list of names.")
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"`classes` {file}: can't be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InputError(f"`classes` {file} is no text in UTF-8.") from None
    if text.lstrip()[:1] in ("[", "{"):
        return _parse(file, text)
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if "" in lines:
        raise InputError(f"`classes` {file}: line {lines.index('') + 1} is empty.")
    return tuple(lines)


def _parse(file: Path, text: str) -> tuple[str, ...]:
    try:
        if text.lstrip().startswith("["):
            return tuple(decode(list[str], parse_json(text.encode())))
        table = decode(dict[str, str], parse_json(text.encode()))
    except InputError as error:
        raise InputError(f"`classes` {file}: {error}") from None
    indices = map(str, range(len(table)))
    if missing := next((index for index in indices if index not in table), None):
        raise InputError(f"`classes` {file}: no name for index {missing}.")
    return tuple(table[str(index)] for index in range(len(table)))

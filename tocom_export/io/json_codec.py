"""The one JSON codec: dataclasses to JSON and back, checked field by field by msgspec.

What a field can be stands in its annotation (``Annotated[int, Meta(ge=1)]``, ``Literal``, another
dataclass); what fields can be together is checked in ``__post_init__``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from ..errors import InputError
from .reading import open_regular

T = TypeVar("T")
LATER: Mapping[str, Any] = {"later": True}
"""Metadata of a field that came when there were files without it: it is left out at its default,
which therefore stays what it is. Such files are the same to the byte as before the field."""


def encode(record: Any, *, defaults: bool = True) -> Any:
    """A record as JSON's types; what is None by default is left out, as is a LATER default.

    Args:
        defaults: False leaves out every field at its default: shorter, and at the mercy of
            later defaults.
    """
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {
            field.name: encode(value, defaults=defaults)
            for field in dataclasses.fields(record)
            if (value := getattr(record, field.name)) != (default := _default(field))
            or (defaults and default is not None and field.metadata != LATER)
        }
    if isinstance(record, Mapping):
        return {str(key): encode(value, defaults=defaults) for key, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [encode(value, defaults=defaults) for value in record]
    return record


def decode(kind: type[T], data: Any) -> T:
    """The inverse of :func:`encode`.

    Raises:
        InputError: a field is missing, unknown, of a wrong type or out of range; names it.
    """
    try:
        if unknown := _unknown(kind, data):
            raise InputError(f"{unknown}: no such field.")
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{_explain(error)}.") from None
    except (OverflowError, RecursionError):
        raise InputError("a number or a structure is too large.") from None


def read_json(file: Path, largest: int) -> Any:
    """The content of a JSON file.

    Args:
        largest: bytes; a larger file is refused unread.

    Raises:
        InputError: the file is too large, or no JSON (which knows neither NaN nor Infinity).
        OSError: it can't be read.
    """
    with open_regular(file) as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise InputError(f"more than {largest} bytes.")
    return parse_json(content)


def parse_json(text: bytes | str) -> Any:
    """A JSON text.

    Raises:
        InputError: it is none.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InputError(f"no JSON: {error}.") from None


def format_json(data: Any) -> str:
    """JSON for people: indented, a line break at its end."""
    return msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _unknown(kind: Any, data: Any, path: str = "") -> str:
    """The first field that a dataclass within ``kind`` doesn't have; empty where there is none."""
    if dataclasses.is_dataclass(kind) and isinstance(data, Mapping):
        record: Any = kind
        hints = _read_hints(record)
        for name, value in data.items():
            if name not in hints:
                return f"{path}{name}"
            if found := _unknown(hints[name], value, f"{path}{name}."):
                return found
    elif isinstance(data, (Mapping, list, tuple)):
        for inner in (part for part in get_args(kind) if _holds_records(part)):
            if get_origin(kind) in (Union, UnionType):
                values: Iterable[tuple[str, Any]] = [(path, data)]
            else:
                items = data.items() if isinstance(data, Mapping) else enumerate(data)
                values = ((f"{path.rstrip('.')}[{key}].", value) for key, value in items)
            for place, value in values:
                if found := _unknown(inner, value, place):
                    return found
    return ""


@cache
def _read_hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _holds_records(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or any(map(_holds_records, get_args(kind)))


def _explain(error: msgspec.ValidationError) -> str:
    """msgspec's message, the field first."""
    text = str(error).replace("`", "")
    found = re.fullmatch(r"(.*) - at (?:key in )?\$\.?(.*)", text, re.DOTALL)
    text, place = (found[1], found[2]) if found else (text, "")
    text = text[:1].lower() + text[1:]
    return f"{place}: {text}" if place else text

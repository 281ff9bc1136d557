"""What an accuracy study leaves behind: one JSON document of measured rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

from ..compression.schedule import MAX_DEGREE
from ..errors import InputError, brief
from ..io.atomic import replaced

FORMAT = 1
METHODS = {"tome": "ToMe", "evit": "EViT"}
"""Each method's name in rows → its name on pages and pictures."""
_MAX_BYTES = 10_000_000  # some 50,000 rows


@dataclass(frozen=True)
class Row:
    """One model at one target degree: accuracies in percent on the whole test split.

    Raises:
        InputError: a field holds what it can't; the message names the field.
    """

    dataset: str
    method: str
    """``tome`` or ``evit``."""
    source: int
    """The degree that the model was trained at."""
    target: int
    """The degree that it was run at."""
    baseline: float
    """With compression alone."""
    tocom: float | None
    """With the bank; None where it wasn't run."""
    reference: float | None
    """Of the model trained at the target degree; None where there is none."""
    seed: int
    scale: float | None = None
    """What the bank's gap was multiplied by."""
    variant: str = "tocom"
    """Another name than this is an ablation: ``shared``, ``classes``, ``rank 1``..."""
    images: int | None = None
    """How many images the test split has."""
    throughput: float | None = None
    """Images per second at the target degree."""
    model: str = ""
    """What was measured, by the name of its file or bundle; empty where that isn't known."""

    def __post_init__(self) -> None:
        _check("dataset", _is_text(self.dataset), "a name", self.dataset)
        _check("variant", _is_text(self.variant), "a name", self.variant)
        _check("model", isinstance(self.model, str), "a name", self.model)
        valid = isinstance(self.method, str) and self.method in METHODS
        _check("method", valid, " or ".join(METHODS), self.method)
        for name in ("source", "target"):
            degree = getattr(self, name)
            valid = type(degree) is int and 0 <= degree <= MAX_DEGREE
            _check(name, valid, f"a degree in 0..{MAX_DEGREE}", degree)
        for name in ("baseline", "tocom", "reference"):
            value = getattr(self, name)
            valid = _is_number(value) and 0 <= value <= 100
            unknown = value is None and name != "baseline"
            _check(name, valid or unknown, "an accuracy in percent, 0..100", value)
        _check("seed", type(self.seed) is int and self.seed >= 0, "a whole number", self.seed)
        _check("scale", self.scale is None or _is_number(self.scale), "a number", self.scale)
        valid = self.images is None or (type(self.images) is int and self.images > 0)
        _check("images", valid, "a whole number above 0", self.images)
        valid = self.throughput is None or (_is_number(self.throughput) and self.throughput > 0)
        _check("throughput", valid, "images per second, above 0", self.throughput)

    @property
    def key(self) -> tuple[str, str, str, int, int, int]:
        """What a newer row of the same measurement has in common with this one."""
        return self.dataset, self.method, self.variant, self.source, self.target, self.seed

    def to_json(self) -> dict[str, Any]:
        """As JSON; what is as it is by default is left out."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    @classmethod
    def from_json(cls, data: Any) -> Row:
        """The inverse of :meth:`to_json`.

        Raises:
            InputError: a field is missing, unknown or holds what it can't.
        """
        if not isinstance(data, dict):
            raise InputError(f"a row is an object, not {_shown(data)}.")
        known = {f.name: f.default is MISSING for f in fields(cls)}
        for name in data.keys() - known.keys():
            raise InputError(f"{name!r} is no field of a row; {', '.join(known)} are.")
        for name, required in known.items():
            if required and name not in data:
                raise InputError(f"the field {name!r} is missing.")
        return cls(**data)


@dataclass(frozen=True)
class Results:
    """The rows of a study and what is to be said about them."""

    rows: tuple[Row, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    """Facts as free text, such as ``model``, ``hardware`` and ``pretraining``."""
    notes: tuple[str, ...] = ()
    """Paragraphs in Markdown."""

    def merge(self, rows: Iterable[Row]) -> Results:
        """With more rows; one with the key of an older row takes its place."""
        merged = {row.key: row for row in self.rows}
        merged.update((row.key, row) for row in rows)
        return replace(self, rows=tuple(merged.values()))

    def with_references(self) -> Results:
        """With the references that the rows of models trained at the target give."""
        trained = {
            (row.dataset, row.method, row.target, row.seed): row.baseline
            for row in self.rows
            if row.source == row.target
        }

        def filled(row: Row) -> Row:
            key = row.dataset, row.method, row.target, row.seed
            return replace(row, reference=trained.get(key, row.reference))

        return replace(self, rows=tuple(map(filled, self.rows)))

    @classmethod
    def load(cls, file: Path) -> Results:
        """Read a document that :meth:`save` wrote.

        Raises:
            InputError: the file can't be read, or a field holds what it can't.
        """
        try:
            if file.stat().st_size > _MAX_BYTES:
                raise InputError("it is too large to be the results of a study.")
            return _parsed(json.loads(file.read_text("utf-8")))
        except OSError as error:
            raise InputError(f"{file}: can't be read: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is no JSON: {brief(error)}.") from None
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    def save(self, file: Path) -> None:
        """Write the document: one row a line, so that a change to one is a change of one line.

        Raises:
            OutputError: the file can't be written.
        """
        text = (
            f'{{\n  "format": {FORMAT},\n  "about": {_dumped(dict(self.about), indent=2)},\n'
            f'  "rows": {_lines(row.to_json() for row in self.rows)},\n'
            f'  "notes": {_lines(self.notes)}\n}}\n'
        )
        with replaced(file) as beside:
            beside.write_text(text, "utf-8", newline="\n")


def _parsed(data: Any) -> Results:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"not the results of a study: its field 'format' must be {FORMAT}.")
    about: Any = data.get("about", {})
    rows: Any = data.get("rows")
    notes: Any = data.get("notes", [])
    texts = isinstance(about, dict) and all(isinstance(value, str) for value in about.values())
    _check("about", texts, "an object of texts", about)
    _check("notes", isinstance(notes, list) and all(map(_is_text, notes)), "a list of texts", notes)
    _check("rows", isinstance(rows, list), "a list of rows", rows)
    found: dict[Any, Row] = {}
    for number, item in enumerate(rows):
        try:
            row = Row.from_json(item)
        except InputError as error:
            raise InputError(f"rows[{number}]: {error}") from None
        if row.key in found:
            raise InputError(f"rows[{number}] measures the same as an earlier row; remove one.")
        found[row.key] = row
    return Results(tuple(found.values()), about, tuple(notes))


def _lines(items: Iterable[Any]) -> str:
    lines = [f"    {_dumped(item)}" for item in items]
    return "[\n" + ",\n".join(lines) + "\n  ]" if lines else "[]"


def _dumped(data: Any, indent: int | None = None) -> str:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, indent=indent)
    return text.replace("\n", "\n  ")  # it stands two columns deep in the document


def _check(name: str, valid: bool, wanted: str, value: object) -> None:
    if not valid:
        raise InputError(f"the field {name!r} must be {wanted}, not {_shown(value)}.")


def _shown(value: object) -> str:
    return repr(value)[:60]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))

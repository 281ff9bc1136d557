"""What an accuracy study leaves behind: one JSON document of measured rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from ..compression.method import Label
from ..compression.schedule import Degree
from ..errors import InputError
from ..io.atomic import replace_file
from ..io.json_codec import LATER, decode, encode, read_json
from ..variant import MAX_SCALE, constant_name
from .accuracy import Interval, find_interval

FORMAT = 1
METHODS = {"tome": "ToMe", "evit": "EViT", "tome within the FFN": "ToMe within the FFN"}
"""Each method's name in rows → its name on pages and plots."""
_LARGEST = 10_000_000  # bytes; some 50,000 rows

Text = Annotated[str, Meta(pattern=r"\S")]
Percent = Annotated[float, Meta(ge=0, le=100)]


@dataclass(frozen=True)
class Row:
    """One model at one target degree: accuracies in percent on the whole test split.

    A variant that isn't called by a degree (``r08``) goes by its name instead.
    """

    dataset: Text
    method: Label
    source: Degree
    """The degree that the model was trained at."""
    target: Degree | None
    """The degree that it was run at; None where ``schedule`` says that."""
    baseline: Percent
    """With compression alone."""
    tocom: Percent | None
    """With the bank; None where it wasn't run."""
    reference: Percent | None
    """Of the model trained at the target degree; None where there is none."""
    seed: Annotated[int, Meta(ge=0)]
    scale: Annotated[float, Meta(ge=0, le=MAX_SCALE)] | None = None
    """What the bank's gap was multiplied by."""
    variant: Text = "tocom"
    """The bank; another name than this is an ablation: ``shared``, ``classes``, ``rank 1``..."""
    images: Annotated[int, Meta(gt=0)] | None = None
    """How many images the test split has."""
    throughput: Annotated[float, Meta(gt=0)] | None = None
    """Images per second."""
    model: str = ""
    """What was measured, by the name of its file or bundle; empty where that isn't known."""
    schedule: str = ""
    """Name of the variant that was run, where that has a degree per layer."""
    neighbours: Annotated[int, Meta(gt=0)] | None = field(default=None, metadata=LATER)
    """How many nearest neighbours voted on each image; None where a head named the classes."""
    knn: str = field(default="", metadata=LATER)
    """Name of the labelled images that they are of; empty where that isn't known."""
    unlabelled_scale: Annotated[float, Meta(ge=0, le=MAX_SCALE)] | None = field(
        default=None, metadata=LATER
    )
    """What the scale would have been, had it been chosen without labels, on the same images."""
    unlabelled: Percent | None = field(default=None, metadata=LATER)
    """With the bank at that scale."""
    searched: Percent | None = field(default=None, metadata=LATER)
    """Of the schedule that was searched for the cost of the target, with compression alone."""
    searched_tocom: Percent | None = field(default=None, metadata=LATER)
    """Likewise with the bank."""
    searched_local: Percent | None = field(default=None, metadata=LATER)
    """Likewise with a bank of the model's own."""
    local: Percent | None = field(default=None, metadata=LATER)
    """At the target degree with a bank of the model's own."""

    @property
    def task(self) -> tuple[object, ...]:
        """What the row of the model that was trained for it has in common with this one."""
        return self.dataset, self.method, self.target, self.seed, self.neighbours, self.knn

    @property
    def key(self) -> tuple[object, ...]:
        """What a newer row of the same measurement has in common with this one."""
        return *self.task, self.variant, self.source, self.schedule

    @property
    def name(self) -> str:
        """Name of the variant that was run."""
        return self.schedule or constant_name((self.target or 0,)) or ""

    @property
    def gain(self) -> float | None:
        """Points that the bank adds."""
        return None if self.tocom is None else self.tocom - self.baseline

    @property
    def accuracy(self) -> float:
        """Of the variant as it is deployed: with the bank, where that was run."""
        return self.baseline if self.tocom is None else self.tocom

    @property
    def interval(self) -> Interval | None:
        """Of :attr:`accuracy`, from the number of images; None where that isn't known."""
        return None if self.images is None else find_interval(self.accuracy, self.images)

    def describe(self, precision: str | None = None, backend: str | None = None) -> dict[str, Any]:
        """The row as ``evaluate --json`` prints it; :func:`parse_row` is the inverse.

        Args:
            precision: of the weights; None where an earlier run measured it, as for ``backend``.
        """
        more = {"variant": self.name, "bank": self.variant, "images": self.images}
        run = {"precision": precision, "backend": backend, **self.describe_accuracy()}
        return {**encode(self, defaults=False), **more, **run}

    def describe_accuracy(self) -> dict[str, float | None]:
        """What follows from the row, and so isn't stored: the accuracy and its interval."""
        low, high = self.interval or (None, None)
        return {"accuracy": self.accuracy, "accuracy_low": low, "accuracy_high": high}


def parse_row(described: Mapping[str, Any]) -> Row:
    """The inverse of :meth:`Row.describe`.

    Raises:
        InputError: a field is missing, unknown or out of range.
    """
    fields = {**described, "variant": described.get("bank", "tocom")}
    derived = ("accuracy", "accuracy_low", "accuracy_high")
    for name in ("bank", "precision", "backend", *derived):
        fields.pop(name, None)
    return decode(Row, fields)


@dataclass(frozen=True)
class Results:
    """The rows of a study and what is to be said about them.

    Raises:
        InputError: two rows measure the same, or a row doesn't say what was run.
    """

    rows: tuple[Row, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    """Facts as free text, such as ``model``, ``hardware`` and ``pretraining``."""
    notes: tuple[Text, ...] = ()
    """Paragraphs in Markdown."""

    def __post_init__(self) -> None:
        known = set()
        for number, row in enumerate(self.rows):
            if (row.target is None) != bool(row.schedule):
                raise InputError(f"rows[{number}] needs either a 'target' or a 'schedule'.")
            if row.key in known:
                raise InputError(f"rows[{number}] measures the same as an earlier row; remove one.")
            known.add(row.key)

    def merge(self, rows: Iterable[Row] = ()) -> Results:
        """With more rows; one with the key of an older row takes its place.

        The baseline of a model that was trained at a degree becomes the reference of all rows
        that have it as their target.
        """
        merged = {row.key: row for row in (*self.rows, *rows)}.values()
        trained = {row.task: row.baseline for row in merged if row.source == row.target}
        referred = (replace(r, reference=trained.get(r.task, r.reference)) for r in merged)
        return replace(self, rows=tuple(referred))

    @classmethod
    def load(cls, file: Path) -> Results:
        """Read a document that :meth:`save` wrote.

        Raises:
            InputError: the file can't be read, or a field holds what it can't.
        """
        try:
            data = read_json(file, _LARGEST)
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise InputError(
                    f"not the results of a study: its field 'format' must be {FORMAT}."
                )
            return decode(cls, data)
        except OSError as error:
            raise InputError(f"{file}: can't be read: {error.strerror}.") from None
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    def save(self, file: Path) -> None:
        """Write the document: one row a line, so that a change to one is a change of one line.

        Raises:
            OutputError: the file can't be written.
        """
        about = _dump(dict(self.about), indent=2).replace("\n", "\n  ")
        text = (
            f'{{\n  "format": {FORMAT},\n  "about": {about},\n'
            f'  "rows": {_dump_lines(map(encode, self.rows))},\n'
            f'  "notes": {_dump_lines(self.notes)}\n}}\n'
        )
        with replace_file(file) as beside:
            beside.write_text(text, "utf-8", newline="\n")


_dump = partial(json.dumps, ensure_ascii=False, allow_nan=False)


def _dump_lines(items: Iterable[Any]) -> str:
    lines = [f"    {_dump(item)}" for item in items]
    return "[\n" + ",\n".join(lines) + "\n  ]" if lines else "[]"

"""What all commands share: verbosity, JSON, progress, and errors as exit statuses."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from tocom_export.compression.schedule import MAX_DEGREE, parse_degrees
from tocom_export.errors import DegreeError, TocomError, brief

F = TypeVar("F", bound=Callable[..., Any])
Advance = Callable[[str], None]


class Output:
    """Where a command's words go: results to stdout, everything else to stderr."""

    def __init__(self, as_json: bool, verbosity: int) -> None:
        self.as_json, self.verbosity = as_json, verbosity

    def note(self, text: str) -> None:
        """One line that a person would want to know; ``-q`` hides it."""
        if self.verbosity >= 0:
            click.echo(text, err=True)

    def detail(self, text: str) -> None:
        """One line for ``-v``."""
        if self.verbosity > 0:
            click.echo(text, err=True)

    def document(self, data: Any) -> None:
        """The result of a command under ``--json``: one document on stdout."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str) -> None:
        """A table on stdout, unless ``--json``; the first column is text, the others numbers."""
        if self.as_json:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False
        )
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))  # no markup in file names or shapes
        # Into a pipe or a file, where no window sets a width, names are not to be folded.
        width = None if sys.stdout.isatty() else 160
        Console(highlight=False, soft_wrap=True, width=width).print(table)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        """A bar on stderr where that is a terminal; call what is yielded before each step."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        hidden = self.verbosity < 0 or not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
            task = bar.add_task(title, total=total)
            started = False

            def advance(step: str) -> None:
                nonlocal started
                bar.update(task, advance=int(started), description=f"{title} {step}")
                started = True

            yield advance


class BadInput(click.ClickException):
    """An error of the package that is the user's to mend."""

    exit_code = 2


class Command(click.Command):
    """Turns the package's own errors into messages; a traceback only with ``-vv``."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TocomError as error:
            if error.exit_status == 0:
                click.echo(str(error), err=True)
                ctx.exit(0)
            if ctx.params.get("verbose", 0) > 1:
                traceback.print_exc()
            kind = BadInput if error.exit_status == 2 else click.ClickException
            raise kind(str(error)) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except MemoryError:
            raise BadInput("There is not enough memory; a smaller batch takes less.") from None
        except Exception as error:
            if ctx.params.get("verbose", 0) > 1:
                traceback.print_exc()
            raise click.ClickException(
                f"{type(error).__name__}: {brief(error)}. This should not happen; please report "
                "it with what -vv prints."
            ) from error


def common_options(function: F) -> F:
    """``--json``, ``-v`` and ``-q``; see :func:`output_of`."""
    for option in (
        click.option("-q", "--quiet", is_flag=True, help="Print results and errors only."),
        click.option("-v", "--verbose", count=True, help="Say more; -vv shows tracebacks."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    ):
        function = option(function)
    return function


def output_of(as_json: bool, verbose: int, quiet: bool) -> Output:
    """The output that the three common options ask for."""
    return Output(as_json, -1 if quiet else verbose)


class Degrees(click.ParamType[tuple[int, ...]]):
    """A list of degrees: ``4,8,12,16`` or ``0-16`` or ``0,4-16:4``."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(parse_degrees(value))
        except DegreeError as error:
            self.fail(str(error), param, ctx)


def installed(*packages: str) -> bool:
    """Whether all of these can be imported, without importing them."""
    try:
        return all(importlib.util.find_spec(package) for package in packages)
    except ModuleNotFoundError:  # of a dotted name, the outer package
        return False


class FiniteFloat(click.ParamType[float]):
    """A number that is neither NaN nor infinite, of at least ``minimum``."""

    name = "NUMBER"

    def __init__(self, minimum: float | None = None) -> None:
        self.minimum = minimum

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number: float = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number) or (self.minimum is not None and number < self.minimum):
            least = "" if self.minimum is None else f" of at least {self.minimum:g}"
            self.fail(f"{value} is not a finite number{least}.", param, ctx)
        return number


DEGREE = click.IntRange(0, MAX_DEGREE)
FILE = click.Path(path_type=Path)


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB"

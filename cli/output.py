"""Where a command's words go, and errors as exit statuses."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import click

from tocom_export.errors import Stopped, TocomError, brief

from .faults import explain_fault, was_interrupted

Advance = Callable[[str], None]


class Output:
    """Results to stdout, everything else to stderr."""

    def __init__(self, as_json: bool, verbosity: int) -> None:
        self.as_json, self.verbosity = as_json, verbosity

    def note(self, text: str) -> None:
        """One line that a person would want to know; ``-q`` hides it.

        Parameters in it (```scale```) become options, as in errors.
        """
        if self.verbosity >= 0:
            context = click.get_current_context(silent=True)
            if context and isinstance(context.command, Command):
                text = context.command.name_options(text)
            click.echo(make_harmless(text), err=True)

    def notes(self, texts: Iterable[str]) -> None:
        """Several of them."""
        for text in texts:
            self.note(text)

    def detail(self, text: str) -> None:
        """One line for ``-v``."""
        if self.verbosity > 0:
            click.echo(make_harmless(text), err=True)

    def fault(self, text: str) -> None:
        """One line on what went wrong while the rest went on; ``-q`` doesn't hide it."""
        click.echo(f"Error: {make_harmless(text)}", err=True)

    def document(self, data: Any) -> None:
        """The result of a command under ``--json``: one document on stdout."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str) -> None:
        """A table on stdout, unless ``--json``; the first column is text, the others numbers.

        In a window that is too narrow for it each row is a paragraph, a line for each cell.
        """
        if self.as_json:
            return
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text

        # Into a pipe or a file, where no window sets a width, names are not to be folded.
        width = None if sys.stdout.isatty() else 160
        console = Console(highlight=False, soft_wrap=True, width=width)
        heading = Text(title) if title else None
        table = Table(title=heading, title_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if index else "left", overflow="fold")
        cells = [[make_harmless(str(cell)) for cell in row] for row in rows]
        for row in cells:
            table.add_row(*map(Text, row))  # no markup in file names or shapes
        needed = Measurement.get(console, console.options.update(width=10_000), table).maximum
        if width is None and needed > console.width:
            click.echo("\n".join(format_paragraphs(columns, cells, title)))
        else:
            console.print(table)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        """A bar on stderr where that is a terminal; call what is yielded before each step."""
        with self.open_bar(title, total) as update:
            done = -1

            def advance(step: str) -> None:
                nonlocal done
                done += 1
                update(completed=done, description=f"{title} {step}")

            yield advance

    @contextmanager
    def open_bar(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """The same; what is yielded takes ``completed`` and ``description``."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        hidden = self.verbosity < 0 or not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
            yield partial(bar.update, bar.add_task(title, total=total))


def make_harmless(text: str) -> str:
    """A text without what would steer a terminal: names in files are other people's."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "�", text)


def format_paragraphs(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str
) -> list[str]:
    """A table as lines: each row's first cell, and below it the others and their columns."""
    lines = [title] if title else []
    widest = max(map(len, columns[1:]), default=0)
    for first, *others in rows:
        lines += [first] if first else []
        pairs = zip(columns[1:], others, strict=True)
        lines += [f"  {column:<{widest}}  {cell}" for column, cell in pairs]
    return lines


class BadInput(click.ClickException):
    """An error of the package that is the user's to mend."""

    exit_code = 2


class Command(click.Command):
    """Turns the package's own errors into messages; a traceback only with ``-vv``."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TocomError as error:
            if was_interrupted(error):
                raise KeyboardInterrupt from error
            text = self.name_options(str(error))
            if error.exit_status == Stopped.exit_status:
                click.echo(text, err=True)
                ctx.exit(error.exit_status)
            if ctx.params.get("verbose", 0) > 1:
                traceback.print_exc()
            kind = BadInput if error.exit_status == 2 else click.ClickException
            raise kind(make_harmless(text)) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except MemoryError:
            raise BadInput("There is not enough memory; a smaller batch takes less.") from None
        except OSError as error:
            if ctx.params.get("verbose", 0) > 1:
                traceback.print_exc()
            raise BadInput(explain_fault(error)) from error
        except Exception as error:
            if was_interrupted(error):
                raise KeyboardInterrupt from error
            if ctx.params.get("verbose", 0) > 1:
                traceback.print_exc()
            raise click.ClickException(
                f"{type(error).__name__}: {brief(error)}. This should not happen; please report "
                "it with what -vv prints."
            ) from error

    def name_options(self, message: str) -> str:
        """A message of the library with its parameters (```scale```) as options (``--scale``).

        A parameter is known by its name here and by its option's: ``--schedule`` is both
        ``schedules`` and ``schedule``.
        """
        called = {}
        for parameter in self.params:
            if isinstance(parameter, click.Option):
                option = max(parameter.opts, key=len)
                called[option.lstrip("-").replace("-", "_")] = called[parameter.name] = option
            else:
                called[parameter.name] = parameter.make_metavar(click.Context(self))
        return re.sub(r"`(\w+)`", lambda found: called.get(found[1], found[0]), message)

"""Types and sets of options that commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from tocom_export.compression.schedule import MAX_DEGREE, MOST

from .output import Output

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)
DEGREE = click.IntRange(0, MAX_DEGREE)
METHOD = click.Choice(["tome", "evit"])
DATA_HELP = (
    "Images: a folder <DIR>/<class>/<image>, WebDataset shards (a folder of .tar files, or "
    "'train-{000..127}.tar'), or a timm data set as torch/cifar10 or hfds/<name>[:<split>]."
)


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers: ``1,8,32``, and spans: ``0-16`` or ``0,4-16:4``."""

    name = "LIST"

    def __init__(self, least: int, most: int, what: str, *, ordered: bool = False) -> None:
        self.least, self.most, self.what, self.ordered = least, most, what, ordered

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(
                r"\s*(\d{1,18})(?:-(\d{1,18})(?::(\d{1,18}))?)?\s*", part, re.ASCII
            )
            if not match:
                self.fail(
                    f"{value!r} is no list of {self.what}; write 4,8,12,16 or 0-16 or 0,4-16:4.",
                    param,
                    ctx,
                )
            first, last, step = (int(text) if text else None for text in match.groups())
            assert first is not None
            if max(first, last or 0) > self.most or first < self.least:
                self.fail(
                    f"{part.strip()!r} is outside the {self.what} {self.least}..{self.most}.",
                    param,
                    ctx,
                )
            if last is not None and (last < first or step == 0):
                self.fail(
                    f"{part.strip()!r} is no rising span; write first-last or first-last:step.",
                    param,
                    ctx,
                )
            span = range(first, (first if last is None else last) + 1, step or 1)
            if len(span) > 10_000:
                self.fail(f"{part.strip()!r}: more than 10,000 numbers.", param, ctx)
            found += span
        return tuple(sorted(set(found)) if self.ordered else dict.fromkeys(found))


DEGREES = Numbers(0, MOST, "degrees", ordered=True)
BATCHES = Numbers(1, 2**31 - 1, "batches")


class Names(click.ParamType[tuple[str, ...]]):
    """Variants by their names or bare degrees: ``0,r08,fast``, and spans of degrees: ``0-16``."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        found: list[str] = []
        for part in map(str.strip, value.split(",")):
            degrees = DEGREES.convert(part, param, ctx) if re.match(r"\d", part) else None
            found += [f"r{degree:02d}" for degree in degrees] if degrees else [part]
        if not all(found):
            self.fail(f"{value!r} is no list of variants, such as 0,8,fast.", param, ctx)
        return tuple(dict.fromkeys(found))


class NamedSchedule(click.ParamType[tuple[str, tuple[int, ...] | str]]):
    """``NAME=20,17,11,6,1,3``, ``NAME=FILE.json`` with such a list, or ``NAME=RULE``.

    What a rule makes of a model isn't known here; its text is checked and passed on.
    """

    name = "NAME=LIST|RULE|FILE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, tuple[int, ...] | str]:
        if isinstance(value, tuple):
            return value
        from tocom_export.compression.rules import is_rule, parse_rule
        from tocom_export.errors import InputError
        from tocom_export.io.json_codec import decode, read_json

        name, equals, text = value.partition("=")
        if not (name and equals and text):
            self.fail(
                f"{value!r} is not NAME=20,17,11,6,1,3, nor NAME=every:3, nor NAME=keep:0.5, nor "
                "NAME=FILE.json.",
                param,
                ctx,
            )
        if text.endswith(".json"):
            try:
                return name, tuple(decode(list[int], read_json(Path(text), 1_000_000)))
            except OSError as error:
                self.fail(f"{text}: can't be read: {error.strerror}.", param, ctx)
            except InputError as error:
                self.fail(f"{text} is no list of degrees: {error}", param, ctx)
        try:
            if is_rule(text):
                parse_rule(text)
                return name, text
            return name, tuple(int(part) for part in text.split(","))
        except InputError as error:
            self.fail(str(error), param, ctx)
        except ValueError:
            self.fail(
                f"{text!r} is neither a list of degrees, one per layer, nor a rule (every:3, "
                "keep:0.5), nor a .json file.",
                param,
                ctx,
            )


class Shares(click.ParamType[tuple[tuple[str, str], ...]]):
    """Shares of the patches, ``0.5`` or ``0.5,0.7`` → schedules that keep them, by their names."""

    name = "SHARE,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[tuple[str, str], ...]:
        if isinstance(value, tuple):
            return value
        from tocom_export.compression.keeping import Keep
        from tocom_export.errors import InputError

        try:
            rules = [Keep.parse(f"keep:{part.strip()}") for part in value.split(",")]
        except InputError:
            self.fail(
                f"{value!r} is no share of the patches; write 0.5, or 0.5,0.7: more than 0, less "
                "than 1.",
                param,
                ctx,
            )
        return tuple(dict.fromkeys((rule.name, str(rule)) for rule in rules))


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


def add_options(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in their order."""

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def method_options(default: str) -> Callable[[F], F]:
    """How tokens are reduced.

    Args:
        default: of the method.
    """
    return add_options(
        click.option("--method", type=METHOD, help=f"Merge or prune; default: {default}."),
        click.option(
            "--proportional/--no-proportional",
            default=None,
            help="Whether a merged token weighs as much as those it stands for; default: the "
            "checkpoint's, else yes. MAE backbones want it off.",
        ),
        click.option(
            "--merge",
            type=click.Choice(["block", "ffn"]),
            help="What merged tokens are spared: all that follows, in their layer and the next "
            "ones (block), or their layer's MLP alone, so that each keeps its place (ffn, for "
            "segmentation and the like); default: as of the method, else block.",
        ),
    )


host_code_option = click.option(
    "--host-code",
    is_flag=True,
    help="Let version-compatible plans run the code that they bring along.",
)
wait_option = click.option(
    "--wait/--no-wait",
    default=True,
    help="Wait while another command writes the same bundle, or say so and stop.",
)
common_options = add_options(
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option(
        "-v", "--verbose", count=True, show_default=False, help="Say more; -vv shows tracebacks."
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print results and errors only."),
)
"""``--json``, ``-v`` and ``-q``; see :func:`take_output`."""


def take_output(options: dict[str, Any]) -> Output:
    """The output that the three common options ask for; they are taken out of ``options``."""
    quiet, verbose = options.pop("quiet"), options.pop("verbose")
    return Output(options.pop("as_json"), -1 if quiet else verbose)


def given_options(ctx: click.Context, names: Iterable[str]) -> Mapping[str, str]:
    """Of some parameters, those that were typed: name → its option."""
    from click.core import ParameterSource

    options = {p.name: p.opts[0] for p in ctx.command.params if p.name}
    default = ParameterSource.DEFAULT
    return {n: options[n] for n in names if ctx.get_parameter_source(n) is not default}


def format_megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.1f} MB"

"""Words of the library in the command line's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

from tocom_export.cli.main import COMMANDS, cli
from tocom_export.cli.options import common_options, take_output
from tocom_export.cli.output import Command, Output
from tocom_export.errors import CheckFailed, InputError, Stopped

Run = Callable[..., Result]


def make_command(error: BaseException | None = None) -> Command:
    """A command that raises an error, if any."""

    @click.command("demo", cls=Command)
    @click.argument("place")
    @click.argument("images", nargs=-1, metavar="IMAGE...")
    @click.option("--scale")
    @click.option("--out", "place_of_result")
    @click.option("--schedule", "schedules", multiple=True)
    @click.option("--crop-scale")
    @click.option("--verify/--no-verify")
    @common_options
    def demo(**options: object) -> None:
        output = take_output(options)
        output.note("begins")
        if error:
            raise error

    return demo


@pytest.mark.parametrize(
    "message, expected",
    [
        ("`scale` 5: too much.", "--scale 5: too much."),
        ("`scale` and `scale`.", "--scale and --scale."),
        ("`crop_scale` 0", "--crop-scale 0"),
        ("`verify` needs torch", "--verify needs torch"),
        ("`verbose`", "--verbose"),
        ("`schedules` fast", "--schedule fast"),  # as the library and as the option calls it
        ("`schedule` fast", "--schedule fast"),
        ("`out`, `place_of_result`", "--out, --out"),
        ("`place` nowhere", "PLACE nowhere"),
        ("`images` none", "IMAGE... none"),
        ("`bank`: none", "`bank`: none"),  # no parameter of this command
        ("scale 5, `scale 5`", "scale 5, `scale 5`"),
        ("", ""),
    ],
)
def test_parameters_become_options(message: str, expected: str):
    assert make_command().name_options(message) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_of_every_command_has_a_name(name: str):
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, Command)
    for parameter in command.params:
        shown = command.name_options(f"`{parameter.name}`")
        option = isinstance(parameter, click.Option)
        assert re.fullmatch("--[a-z][a-z0-9-]*" if option else r"[\[\]A-Z|.=-]+|{bash.*}", shown), (
            shown
        )


@pytest.mark.parametrize(
    "error, status, says",
    [
        (InputError("`scale` 5: too much."), 2, "Error: --scale 5: too much."),
        (CheckFailed("`place` differs."), 1, "Error: PLACE differs."),
        (Stopped("saved to `out`."), 130, "saved to --out."),
        (MemoryError(), 2, "Error: There is not enough memory; a smaller batch takes less."),
        (
            ZeroDivisionError("by `scale`"), 1,
            "Error: ZeroDivisionError: by `scale`. This should not happen; please report it with "
            "what -vv prints.",
        ),
    ],
)  # fmt: skip
def test_errors_and_their_statuses(error: BaseException, status: int, says: str):
    result = CliRunner().invoke(make_command(error), ["here", "-q"])
    assert result.exit_code == status
    assert result.stderr.strip() == says


def test_a_traceback_is_for_those_who_ask():
    command = make_command(InputError("`scale` 5: too much."))
    assert "Traceback" not in CliRunner().invoke(command, ["here", "-v"]).stderr
    loud = CliRunner().invoke(command, ["here", "-vv"]).stderr
    assert "Traceback" in loud
    assert loud.endswith("Error: --scale 5: too much.\n")


def test_results_are_on_stdout_and_the_rest_on_stderr(capsys: pytest.CaptureFixture):
    output = Output(as_json=False, verbosity=0)
    output.note("told")
    output.detail("a detail")
    output.document({"a": 1})
    output.table(["name", "number"], [["[b]", 1], ["a" * 120, "10 %"]], "[title]")
    out, err = capsys.readouterr()
    assert err == "told\n"
    assert [line.split() for line in out.splitlines()] == [
        ["[title]"], ["name", "number"], ["[b]", "1"], ["a" * 120, "10", "%"]
    ]  # fmt: skip


def test_json_is_all_that_is_on_stdout(capsys: pytest.CaptureFixture):
    output = Output(as_json=True, verbosity=1)
    output.note("told")
    output.detail("a detail")
    output.document({"a": [1, None]})
    output.table(["name"], [["a"]], "title")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": [1, None]}
    assert err == "told\na detail\n"


def test_quiet(capsys: pytest.CaptureFixture):
    output = Output(as_json=False, verbosity=-1)
    output.note("told")
    output.detail("a detail")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "terminal, verbosity, shown", [(1, 0, True), (1, -1, False), (0, 0, False)]
)
def test_a_bar_is_for_terminals(
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    terminal: int,
    verbosity: int,
    shown: bool,
):
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # which is how rich is told so
    with Output(False, verbosity).progress("writing", 2) as advance:
        advance("one")
        advance("two")
    out, err = capsys.readouterr()
    assert out == ""
    assert ("writing two" in err) is shown

"""The entry point ``tocom-export``; commands are imported when they are asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any

import click

from tocom_export._version import __version__
from tocom_export.io.interrupting import catch_signals, leave_signals

from .faults import (
    ClosedPipe,
    explain_fault,
    keep_closed_pipes,
    leave,
    open_streams,
)

COMMANDS = {
    "build": "Write engines for some degrees from a checkpoint and a ToCom bank.",
    "inspect": "Say what a bundle, an engine, a bank or a checkpoint is.",
    "refit": "Put other weights into an engine, without building it again.",
    "verify": "Hold every engine of a bundle against the PyTorch model.",
    "run": "Classify image files with one engine of a bundle.",
    "show": "Draw which patches of an image become one token.",
    "tune": "Find the schedule that loses least at a cost, without labels.",
    "bench": "Time the engines of a bundle.",
    "train": "Distil a ToCom bank from a model and its pre-training images.",
    "finetune": "Train a model at a source degree.",
    "evaluate": "Measure accuracy over sources × targets, with and without ToCom.",
    "serve": "Serve bundles over HTTP, with the variant that load allows.",
    "triton": "Write a Triton Inference Server model repository of a bundle.",
    "completion": "Print what makes a shell complete commands and options.",
}
"""Name and one line of help of each command, in the order of ``--help``."""


class Cli(click.Group):
    """Imports a command's module on first use, and keeps errors to a line or two."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"tocom_export.cli.commands.{name}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        near = difflib.get_close_matches(args[0], COMMANDS, 1)
        if near and args[0] not in COMMANDS:
            raise click.UsageError(f"No such command {args[0]!r}; did you mean {near[0]}?", ctx)
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with keep_closed_pipes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with keep_closed_pipes():
            return super().invoke(ctx)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            status = super().main(*args, **kwargs)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            status = 2
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "tocom-export"
            click.echo(f"Error: {error.format_message()}\nSee '{path} --help'.", err=True)
            status = 2
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
            status = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            click.echo("Stopped.", err=True)
            status = 130
        except (ClosedPipe, BrokenPipeError):
            status = 141
        except OSError as error:
            click.echo(f"Error: {explain_fault(error)}", err=True)
            status = 2
        leave(status if isinstance(status, int) else 0)


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog="Example: tocom-export build --source 0 --targets 4,8,12,16",
)
@click.version_option(__version__, prog_name="tocom-export")
def cli() -> None:
    """One trained Vision Transformer, exported at many costs without retraining."""


def main() -> None:
    """Run the command line."""
    catch_signals()
    try:
        open_streams()
        cli()
    except OSError as error:
        click.echo(f"Error: {explain_fault(error)}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:  # while another fault was being told
        click.echo("Stopped.", err=True)
        sys.exit(130)
    finally:
        leave_signals()


if __name__ == "__main__":
    main()

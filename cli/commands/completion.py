"""``tocom-export completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ..output import Command


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands and options.

    \b
    Examples:
      tocom-export completion bash > ~/.local/share/bash-completion/completions/tocom-export
      source <(tocom-export completion zsh)
      tocom-export completion fish > ~/.config/fish/completions/tocom-export.fish
    """
    known = get_completion_class(shell)
    assert known is not None
    source = known(ctx.find_root().command, {}, "tocom-export", "_TOCOM_EXPORT_COMPLETE").source()
    click.echo(source)

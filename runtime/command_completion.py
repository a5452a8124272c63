"""The command ``completion``."""

from __future__ import annotations

import click

from llava_deploy.runtime.command_group import PROGRAM, examples


@click.command(epilog=examples("completion bash >> ~/.bashrc"))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    kind = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}[shell]
    whole = click.get_current_context().find_root().command
    variable = f"_{PROGRAM}_COMPLETE".replace("-", "_").upper()
    click.echo(kind(whole, {}, PROGRAM, variable).source())

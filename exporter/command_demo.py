"""The command ``demo``. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path

import click

from llava_deploy.runtime.command_group import examples, quiet
from llava_deploy.runtime.command_options import PATH


@click.command(epilog=examples("demo", "demo -o elsewhere --seed 7"))
@click.option("-o", "--output", type=PATH, default=Path("demo-output"), show_default=True, metavar="DIR")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the drawn pictures.")
def demo(output: Path, seed: int) -> None:
    """Go the whole way with the shipped tiny LLaVA.

    Export, build, questions about pictures drawn on the spot, the comparison with PyTorch, and timings.
    """
    from llava_deploy.engines.errors import LlavaDeployError
    from llava_deploy.runtime import terminal

    with terminal.progress("loading PyTorch", quiet=quiet()):
        from llava_deploy.exporter.demo.showcase import showcase

    if problems := showcase(output, seed, terminal.out()):
        raise LlavaDeployError("; ".join(problems))

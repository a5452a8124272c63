"""What ``eval`` asks for. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_deploy.runtime.command_group import options_as_one
from llava_deploy.runtime.command_options import PATH, backend_option, json_option

if TYPE_CHECKING:
    from llava_deploy.runtime.backend_choice import BackendName


@dataclass(frozen=True)
class EvalRequest:
    """Which questions, how they are asked, and of what."""

    data: Path | None
    per_kind: int
    seed: int
    blank: bool
    batch: int
    backend: BackendName
    max_new_tokens: int
    as_json: bool


eval_options = options_as_one(
    "request",
    EvalRequest,
    click.option("--data", type=PATH, metavar="FILE", help='JSON lines {"image", "question", "answer"[, "kind"]}.'),
    click.option("--per-kind", type=int, default=100, show_default=True, help="Drawn questions of each kind."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the drawn pictures."),
    click.option("--blank", is_flag=True, help="Show a blank picture every time: what is right then is guessed."),
    click.option("--batch", type=int, default=1, show_default=True, help="Questions at once."),
    backend_option,
    click.option("--max-new-tokens", type=int, default=32, show_default=True, help="Longest answer."),
    json_option,
)

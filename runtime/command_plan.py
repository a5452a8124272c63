"""What ``plan`` asks for. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import click

from llava_deploy.engines.names import Precision
from llava_deploy.runtime.command_build import parts_option
from llava_deploy.runtime.command_group import options_as_one
from llava_deploy.runtime.command_options import json_option


@dataclass(frozen=True)
class PlanRequest:
    """On what, how much of it at once, and of a checkpoint how it would be exported."""

    board: str
    max_batch: int
    max_len: int | None
    max_images: int | None
    parts: int | None
    precision: Precision | None
    group_size: int | None
    as_json: bool


plan_options = options_as_one(
    "request",
    PlanRequest,
    click.option(
        "--board", default="auto", show_default=True, metavar="NAME", help="A board or card; auto: this machine."
    ),
    click.option("--max-batch", type=int, default=1, show_default=True, help="Prompts at once."),
    click.option("--max-len", type=int, help="Tokens of context; by default the model's positions."),
    click.option("--max-images", type=int, help="Pictures in one run of the tower; as many as prompts."),
    parts_option,
    click.option(
        "--precision", type=click.Choice(get_args(Precision)), help="Of a checkpoint's bundle; fp16 by default."
    ),
    click.option("--group-size", type=int, help="Of int4: inputs that share a scale; 128 by default."),
    json_option,
)

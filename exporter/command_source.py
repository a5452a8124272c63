"""What commands ask of a checkpoint. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from llava_deploy.engines.names import HeadPrecision
from llava_deploy.exporter.quantization.request import QuantizeRequest
from llava_deploy.runtime.command_group import options_as_one, say
from llava_deploy.runtime.command_options import PATH

if TYPE_CHECKING:
    from llava_deploy.exporter.checkpoint import Checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint and what the options say about it."""

    directory: Path
    vision_tower: Path | None
    projector: Path | None
    lora: Path | None
    quantized: Path | None
    conversation: str | None

    def open(self) -> Checkpoint:
        """Open it with its options."""
        from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint

        options = CheckpointOptions(self.vision_tower, self.projector, self.lora, self.conversation, self.quantized)
        return open_checkpoint(self.directory, options)


OF_CHECKPOINTS = tuple(field.name for field in dataclasses.fields(Source) if field.name != "directory")
"""The options of :class:`Source`, as a command's function calls them."""

vision_tower_option = click.option(
    "--vision-tower", type=PATH, metavar="DIR", help="Tower of an original-layout checkpoint."
)
projector_option = click.option(
    "--projector", type=PATH, metavar="FILE", help="Projector-only file to lay over a base model."
)
lora_option = click.option("--lora", type=PATH, metavar="DIR", help="LoRA adapter in PEFT layout to merge.")
quantized_option = click.option(
    "--quantized", type=PATH, metavar="FILE", help="TinyChat's int4 file (llm-awq) to lay over it."
)
conversation_option = click.option(
    "--conversation", metavar="NAME", help="Instead of its template: vicuna_v1, llama_2, mistral or plain."
)

source_options = options_as_one(
    "source",
    Source,
    click.argument("directory", type=PATH, metavar="CHECKPOINT"),
    vision_tower_option,
    projector_option,
    lora_option,
    quantized_option,
    conversation_option,
)
"""The argument ``CHECKPOINT`` and its options, which a command gets as ``source``."""

quantizing_options = options_as_one(
    "quantizing",
    QuantizeRequest,
    click.option("--group-size", type=int, help="Of int4: inputs that share a scale, 32, 64 or 128; 128 by default."),
    click.option("--symmetric", is_flag=True, help="Of int4: no zero points."),
    click.option("--lm-head", type=click.Choice(get_args(HeadPrecision)), help="Of int4: the output layer; or fp16."),
    click.option("--calibration", metavar="FILE", help="Of int4-awq: JSON lines of messages; demo: drawn pictures."),
    click.option("--device", metavar="NAME", help="Of int4-awq and --goldens: where PyTorch computes, cpu or cuda."),
)


def say_unused(checkpoint: Checkpoint) -> None:
    """Config keys that this version knows nothing of are said, not passed over."""
    if checkpoint.unused_keys:
        say(f"config keys that have no effect here: {', '.join(checkpoint.unused_keys)}")

"""What ``swap`` asks for, and what it does. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from llava_deploy.engines.names import SwapPart
from llava_deploy.exporter.command_source import (
    Source,
    conversation_option,
    lora_option,
    projector_option,
    quantized_option,
    say_unused,
    vision_tower_option,
)
from llava_deploy.runtime.command_group import PROGRAM, examples, options_as_one, quiet, say
from llava_deploy.runtime.command_options import PATH
from llava_deploy.runtime.printable import as_argument

_from_options = options_as_one(
    "source",
    Source,
    click.option(
        "--from", "directory", type=PATH, required=True, metavar="CHECKPOINT", help="The model with new weights."
    ),
    vision_tower_option,
    projector_option,
    lora_option,
    quantized_option,
    conversation_option,
)


@click.command(
    "swap",
    epilog=examples(
        "swap bundle --from finetuned --part projector",
        "swap bundle --from llava-1.5-7b-hf --lora adapter --part decoder",
    ),
)
@click.argument("bundle", type=PATH)
@_from_options
@click.option(
    "--part", type=click.Choice(get_args(SwapPart)), required=True, help="What to take of it; decoder: with embeddings."
)
@click.option("--without-goldens", is_flag=True, help="Drop the bundle's goldens instead of recording them anew.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Of goldens: where PyTorch computes.")
def swap(bundle: Path, source: Source, part: SwapPart, without_goldens: bool, device: str) -> None:
    """Put other weights into a bundle.

    A fine-tuned projector or a decoder, with a LoRA adapter merged or not, takes the place of the bundle's own. It has
    to be of the same model: shapes, tokens and everything else that the graphs hold. Weights of an int4 bundle are
    rounded as the bundle's were; those of int4-awq would have to be searched, which is an export.

    The rest of the bundle stays as it is, and the new one is there when it is whole, or not at all. Goldens are
    recorded anew. Engines of ONNX Runtime are built again, those of TensorRT refitted where they were built with
    --refit; others are dropped.
    """
    from llava_deploy.runtime import terminal

    watch = terminal.Stopwatch()
    notes: list[str] = []  # said when there is no bar in their way
    with terminal.progress("swapping", quiet=quiet()) as step:
        from llava_deploy.exporter.swap.swap import AfterSwap
        from llava_deploy.exporter.swap.swap import swap as swap_weights

        checkpoint = source.open()
        swap_weights(
            checkpoint,
            bundle,
            part,
            goldens=AfterSwap.DROP if without_goldens else AfterSwap.RECORD,
            device=device,
            on_progress=lambda at: step(at.done, at.total),
            on_step=step,
            say=notes.append,
        )
    for note in notes:
        say(note)
    say(f"{part} of {source.directory} in {watch}")
    say_unused(checkpoint)
    say(f"next: {PROGRAM} selftest {as_argument(bundle)}")
    click.echo(bundle)

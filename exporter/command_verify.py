"""The command ``verify``. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_deploy.exporter.command_source import Source, say_unused, source_options
from llava_deploy.runtime.command_group import examples, quiet
from llava_deploy.runtime.command_options import PATH, backend_option, json_option, load_pictures, raw_option

if TYPE_CHECKING:
    from llava_deploy.runtime.backend_choice import BackendName


@click.command(epilog=examples("verify llava-1.5-7b-hf bundle", "verify checkpoint bundle --image photo.jpg --json"))
@source_options
@click.argument("bundle", type=PATH)
@click.option("--image", metavar="PICTURE", help="By default one that is drawn.")
@click.option("--prompt", default="What is in the picture?", show_default=True, help="The question about it.")
@raw_option
@click.option("--max-new-tokens", type=int, default=32, show_default=True, help="Tokens to compare.")
@backend_option
@json_option
def verify(
    source: Source,
    bundle: Path,
    image: str | None,
    prompt: str,
    raw: bool,
    max_new_tokens: int,
    backend: BackendName,
    as_json: bool,
) -> None:
    """Compare a bundle with PyTorch.

    Both get the same picture and prompt, and are compared stage by stage: pixels, tower layer by layer, projector,
    splice, decoder layer by layer, logits, tokens. Fails where a stage leaves its tolerance, and names the first.

    Of an int4 bundle, PyTorch's decoder takes the weights that the bundle's stand for: this says whether they are
    computed with rightly, and eval says what it costs that they are int4.
    """
    from llava_deploy.engines.errors import LlavaDeployError
    from llava_deploy.engines.manifest import read_manifest
    from llava_deploy.exporter.demo.questions import drawn_picture
    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.terminal_run import Request, Template, prompt_of
    from llava_deploy.runtime.terminal_selftest import stage_table

    picture = drawn_picture() if image is None else load_pictures((image,))[0]
    request = Request(prompt, [picture], Template.RAW if raw else Template.MODEL)
    text = prompt_of(request, read_manifest(bundle).chat)
    with terminal.progress("comparing with PyTorch", quiet=quiet()):
        from llava_deploy.exporter.verify import verify as compare

        checkpoint = source.open()
        report = compare(
            checkpoint, bundle, prompt=text, picture=picture, max_new_tokens=max_new_tokens, backend=backend
        )
    say_unused(checkpoint)
    terminal.show(report.to_dict() if as_json else stage_table(report.stages))
    if report.first_failure is not None:
        raise LlavaDeployError(f"{report.first_failure} is the first stage out of tolerance")

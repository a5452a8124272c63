"""What ``record`` and ``export --goldens`` ask for, and what they do. Nothing heavy is imported before they run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from llava_deploy.exporter.command_source import Source, say_unused, source_options
from llava_deploy.runtime.command_group import PROGRAM, examples, quiet, say
from llava_deploy.runtime.command_options import PATH
from llava_deploy.runtime.printable import as_argument

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llava_deploy.engines.manifest import FileEntry, Manifest
    from llava_deploy.exporter.checkpoint import Checkpoint
    from llava_deploy.exporter.export import Recorder

goldens_option = click.option(
    "--goldens", is_flag=True, help="Record answers of PyTorch too; takes PyTorch, and memory for a decoder layer."
)


@click.command("record", epilog=examples("record llava-1.5-7b-hf bundle", "record checkpoint bundle --device cuda"))
@source_options
@click.argument("bundle", type=PATH)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where PyTorch computes: cpu or cuda.")
def record(source: Source, bundle: Path, device: str) -> None:
    """Record PyTorch's answers into a bundle.

    These are goldens: drawn pictures and prompts with PyTorch's pixels, image features, embeddings, logits and greedy
    tokens. The bundle carries them to the machine that runs it, where the self-test holds against them what is
    installed there, without PyTorch. Goldens that the bundle had are replaced; its engines stay.

    CHECKPOINT is the one that the bundle was exported from, with the same options. PyTorch computes in float32; a
    decoder that memory does not hold goes through it layer by layer.
    """
    from llava_deploy.runtime import terminal

    watch = terminal.Stopwatch()
    with terminal.progress("recording goldens", quiet=quiet()) as step:
        from llava_deploy.exporter.goldens.record import RecordOptions, is_golden
        from llava_deploy.exporter.goldens.record import record as record_into

        checkpoint = source.open()
        manifest = record_into(checkpoint, bundle, RecordOptions(device), on_progress=step, on_note=say)
    say(f"{_what(entry for entry in manifest.files if is_golden(entry.path))}, in {watch}")
    say_unused(checkpoint)
    say(f"next: {PROGRAM} build {as_argument(bundle)} --backend onnxruntime")
    click.echo(bundle)


def goldens_of(checkpoint: Checkpoint, device: str | None, bars: ExitStack) -> Recorder:
    """For an export: records goldens into the directory that is being written.

    Args:
        checkpoint: as it is exported.
        device: where PyTorch computes; ``None``: on the CPU.
        bars: of the export's progress; those that it shows are taken off, and another one is shown.

    Raises:
        OptionError: PyTorch has no such device.
    """
    from llava_deploy.exporter.goldens.record import RecordOptions, record_goldens
    from llava_deploy.exporter.reference.torch_decoder import torch_device
    from llava_deploy.runtime import terminal

    options = RecordOptions("cpu" if device is None else device)
    torch_device(options.device)  # now: the export may take long

    def into(directory: Path, manifest: Manifest) -> tuple[FileEntry, ...]:
        bars.pop_all().close()
        watch = terminal.Stopwatch()
        with terminal.progress("recording goldens", quiet=quiet()) as step:
            entries = record_goldens(checkpoint, directory, manifest, options, on_progress=step, on_note=say)
        say(f"{_what(entries)}, in {watch}")
        return entries

    return into


def _what(entries: Iterable[FileEntry]) -> str:
    """Names and size of what was recorded: each golden has a directory of its own."""
    from llava_deploy.engines.goldens import GOLDENS
    from llava_deploy.runtime import terminal

    found = list(entries)
    names = dict.fromkeys(PurePosixPath(entry.path).parent.name for entry in found)
    size = terminal.size(sum(entry.size for entry in found))
    return f"goldens recorded: {', '.join(name for name in names if name != GOLDENS)}, {size}"

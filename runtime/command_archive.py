"""``pack`` and ``unpack``: a bundle as one file, and back. Nothing heavy is imported before they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llava_deploy.runtime.command_group import PROGRAM, examples, quiet, say
from llava_deploy.runtime.command_options import PATH
from llava_deploy.runtime.printable import as_argument

if TYPE_CHECKING:
    from rich.table import Table

    from llava_deploy.runtime.archive.pack import Packed


@click.command(
    epilog=examples("pack bundle -o model.lvd", "pack bundle -o model.lvd --engine onnxruntime-1.32.0-cpu --no-graphs")
)
@click.argument("bundle", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="ARCHIVE", help="File to write, model.lvd.")
@click.option(
    "--engine", "engines", multiple=True, metavar="NAME", help="Pack this engine too; all takes each; repeatable."
)
@click.option("--no-graphs", is_flag=True, help="Leave the graphs out: the archive runs where its engines run only.")
@click.option("--without-goldens", is_flag=True, help="Leave out what a self-test compares with.")
@click.option("--force", is_flag=True, help="Replace an archive that is there.")
def pack(
    bundle: Path, output: Path, engines: tuple[str, ...], no_graphs: bool, without_goldens: bool, force: bool
) -> None:
    """Put a bundle into one file, to take it to where it will run.

    An archive is a tar in zstd. It has the graphs, the tokenizer and the goldens, PyTorch's answers to test with; no
    engine by default, since an engine is for one version of its backend and one kind of device. Every file is compared
    with the manifest on the way. The same bundle gives the same archive.
    """
    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.archive.contents import PackOptions, engine_names
    from llava_deploy.runtime.archive.pack import pack as write

    watch = terminal.Stopwatch()
    options = PackOptions(engines, graphs=not no_graphs, goldens=not without_goldens)
    with terminal.progress("packing", quiet=quiet()) as step:
        packed = write(bundle, output, options, replace=force, on_progress=step)
    if not engines and (left := engine_names(bundle)):
        say(f"without {', '.join(left)}: an engine is for one version and device; --engine takes it along")
    if packed.doubled and not no_graphs:
        say(f"{terminal.size(packed.doubled)} are in it twice, of graphs and engine; --no-graphs packs them once")
    say(f"{_sizes(packed)}, in {watch}")
    name = as_argument(Path(bundle.resolve().name))
    say(f"next: take it there, then: {PROGRAM} unpack {as_argument(Path(output.name))} -o {name}")
    click.echo(output)


@click.command(epilog=examples("unpack model.lvd -o bundle"))
@click.argument("archive", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="BUNDLE", help="Directory to write.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
def unpack(archive: Path, output: Path, force: bool) -> None:
    """Make a bundle of an archive again.

    Every byte is compared with what the archive says that it holds, before the bundle appears, whole or not at all.
    What an archive does not list, links and paths that lead elsewhere are refused.
    """
    from llava_deploy.engines.goldens import has_goldens
    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.archive.unpack import unpack as write

    watch = terminal.Stopwatch()
    with terminal.progress("unpacking", quiet=quiet()) as step:
        manifest = write(archive, output, replace=force, on_progress=step)
    say(f"{manifest.model.name} in {manifest.model.precision}, every file as it was packed, in {watch}")
    say(f"next: {PROGRAM} {'selftest' if has_goldens(manifest) else 'inspect'} {as_argument(output)}")
    click.echo(output)


def describe_archive(path: Path, *, as_json: bool) -> dict[str, Any] | Table:
    """What ``inspect`` says of an archive; it is not unpacked."""
    import dataclasses

    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.archive.archive import open_archive

    with open_archive(path) as archive:
        listing, manifest = archive.listing, archive.manifest
        if as_json:
            sizes = {"size": archive.size, "content_size": archive.content_size}
            return {"archive": {**dataclasses.asdict(listing), **sizes}, "manifest": dataclasses.asdict(manifest)}
        return terminal.archive_facts(path, manifest, archive.size, listing.engines)


def _sizes(packed: Packed) -> str:
    from llava_deploy.runtime import terminal

    ratio = f", {packed.size / packed.weights:.3f} x the weights" if packed.weights else ""
    return f"{terminal.size(packed.size)}{ratio}"

"""Tables, progress bars and small pictures for people at a terminal; everything else gets by without Rich."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from llava_deploy.engines.engine_manifest import built_engines
from llava_deploy.engines.goldens import has_goldens
from llava_deploy.engines.manifest import Manifest
from llava_deploy.runtime.printable import printable, printable_json

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_COLUMNS = 16
"""Characters across a small picture; it has half as many lines."""

Step = Callable[[int, int], None]
"""Tells a progress bar how much is done, and of how much."""


class _Console(Console):
    """A console whose texts have no commands for the terminal in them; Rich itself lets ESC through."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def out() -> Console:
    """Standard output; where it is not a terminal, lines are as wide as they want to be."""
    console = _Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console


def show(value: RenderableType | Mapping[str, Any]) -> None:
    """On standard output: tables for people, a mapping as JSON."""
    console = out()
    if isinstance(value, Mapping):
        console.file.write(printable_json(json.dumps(value, indent=1, ensure_ascii=False)) + "\n")
    elif console.is_terminal:
        console.print(value, crop=False)
    else:
        with console.capture() as captured:
            console.print(value)
        console.file.writelines(f"{line.rstrip()}\n" for line in captured.get().strip("\n").splitlines())


@contextlib.contextmanager
def progress(what: str, *, quiet: bool) -> Iterator[Step]:
    """A bar on standard error for as long as the block runs; nothing where that is not a terminal, or with ``quiet``.

    The bar shows nothing but a spinner until its length is known.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _done, _total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(count: float) -> str:
    """Bytes for people: ``9.9 MB``."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def seconds(value: float) -> str:
    """A time for people: ``840 ms``, ``3.2 s``, ``4 min 12 s``."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def facts(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Names with their values, under a title."""
    table = Table(
        box=None, show_header=False, title=escape(title), title_justify="left", title_style="bold", padding=(0, 2)
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def bundle_facts(directory: Path, manifest: Manifest) -> Table:
    """Everything that a person wants to know of a bundle."""
    engines = [engine.name for engine in built_engines(directory)]
    rest = [("engines", ", ".join(engines) if engines else "none; llava-deploy build makes one")]
    return facts(f"Bundle {directory}", _model_facts(manifest, rest))


def archive_facts(archive: Path, manifest: Manifest, packed: int, engines: Sequence[str]) -> Table:
    """Likewise of an archive of ``packed`` bytes."""
    rest = [("packed", size(packed)), ("engines", ", ".join(engines) if engines else "none")]
    return facts(f"Archive {archive}", _model_facts(manifest, rest))


def _model_facts(manifest: Manifest, rest: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    model, vision, decoder = manifest.model, manifest.vision, manifest.decoder
    limit, left_out = manifest.splice.model_max_length, manifest.left_out
    return [
        ("model", f"{model.name} ({model.layout} layout), {model.parameters:,} parameters, {model.precision}"),
        ("vision", model.vision),
        ("projector", model.projector),
        ("decoder", model.decoder),
        (
            "context",
            f"{decoder.max_positions} tokens, {vision.patches} a picture"
            + ("" if limit is None else f"; prompts up to {limit}"),
        ),
        ("pictures", picture_steps(dataclasses.asdict(manifest.image))),
        ("prompts", prompt_form(dataclasses.asdict(manifest.chat))),
        ("files", f"{len(manifest.files)}, {size(sum(entry.size for entry in manifest.files))}"),
        *([("left out", ", ".join(entry.path for entry in left_out))] if left_out else []),
        ("goldens", "in it" if has_goldens(manifest) else "none"),
        *rest,
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ]


def picture_steps(image: Mapping[str, Any]) -> str:
    """An :class:`~llava_deploy.engines.manifest.ImageRecipe`, as plain values, in words."""
    pad, resize, crop, mean = image["pad_to_square"], image["resize"], image["crop"], image["mean"]
    steps = ["padded to a square"] if pad else []
    if resize is not None:
        edges = f"shortest edge {resize[1]}" if resize[0] == "shortest_edge" else f"{resize[1]} x {resize[2]}"
        steps.append(f"resized to {edges} (filter {image['resample']})")
    if crop is not None:
        steps.append(f"centre crop {crop[0]} x {crop[1]}")
    if mean is not None:
        steps.append(f"normalised by mean {', '.join(f'{value:.3f}' for value in mean)}")
    return ", ".join(steps) if steps else "as they are"


def prompt_form(chat: Mapping[str, Any]) -> str:
    """A :class:`~llava_deploy.engines.manifest.ChatRecipe`, as plain values, in words."""
    form = chat["conversation"] if chat["template"] is None else "the model's own chat template"
    stops = [*(f"token {token}" for token in chat["stop_token_ids"]), *map(repr, chat["stop_strings"])]
    return f"{form}, {chat['placeholder']!r} for a picture, stop at {', '.join(stops) if stops else 'nothing'}"


def thumbnail(picture: Image.Image) -> list[Text]:
    """A square picture in coloured half blocks: :data:`THUMBNAIL_COLUMNS` by half as many lines."""
    side = THUMBNAIL_COLUMNS
    small = picture.convert("RGB").resize((side, side))
    lines = []
    for y in range(0, side, 2):
        line = Text()
        for x in range(side):
            upper, lower = (small.getpixel((x, at)) for at in (y, y + 1))
            line.append("▀", Style.parse(f"{_hex(upper)} on {_hex(lower)}"))
        lines.append(line)
    return lines


def print_thumbnail(picture: Image.Image) -> None:
    """On standard output, where that can show it."""
    console = out()
    if shows_pictures(console):
        for line in thumbnail(picture):
            console.print(line)


def shows_pictures(console: Console) -> bool:
    """Whether :func:`thumbnail` is worth showing there: a terminal with 256 colours or more that knows the blocks."""
    utf8 = console.encoding.lower().startswith("utf")
    return console.is_terminal and utf8 and console.color_system in ("256", "truecolor", "windows")


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __str__(self) -> str:
        return seconds(time.perf_counter() - self._began)


def _hex(pixel: object) -> str:
    if not isinstance(pixel, tuple):
        raise TypeError(f"want a pixel of three channels, got {pixel!r}")
    return "#{:02x}{:02x}{:02x}".format(*pixel)

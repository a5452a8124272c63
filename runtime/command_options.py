"""Options that commands share, and what they load. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from llava_deploy.engines.names import Backend
from llava_deploy.runtime.command_group import options_as_one, quiet, say

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_deploy.runtime import Llava
    from llava_deploy.runtime.backend_choice import BackendName
    from llava_deploy.runtime.terminal_run import AnswerOptions

PATH = click.Path(path_type=Path)
"""An argument or option that is a path."""


@dataclass(frozen=True)
class Answering:
    """What ``run`` and ``chat`` ask of a model."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    backend: BackendName
    max_len: int | None
    threads: int | None

    def options(self) -> AnswerOptions:
        """How to answer."""
        from llava_deploy.runtime import SamplingOptions
        from llava_deploy.runtime.terminal_run import AnswerOptions

        sampling = SamplingOptions(self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)
        return AnswerOptions(self.max_new_tokens, sampling, self.stop)

    def load(self, bundle: Path) -> Llava:
        """Load a bundle with the backend, cache and threads that are asked for."""
        return load_bundle(bundle, self.backend, self.max_len, self.threads)


def load_bundle(
    bundle: Path, backend: BackendName = "auto", max_len: int | None = None, threads: int | None = None
) -> Llava:
    """Load a bundle, with a spinner where that takes long, and say which backend runs it."""
    from llava_deploy.engines.manifest import read_manifest
    from llava_deploy.runtime import Llava

    waiting: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if sys.stderr.isatty() and sum(entry.size for entry in read_manifest(bundle).files) > _LOADS_AT_ONCE:
        from llava_deploy.runtime import terminal  # Rich takes its time: a small bundle is loaded before it is there

        waiting = terminal.progress("loading", quiet=quiet())
    with waiting:
        llava = Llava.load(bundle, backend=backend, max_len=max_len, threads=threads)
    say(llava.backend)
    return llava


_LOADS_AT_ONCE = 256 << 20
"""Bytes: a bundle up to this size is loaded in less than a second."""


backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", *get_args(Backend)]),
    default="auto",
    show_default=True,
    help="What runs it; auto takes the best that the bundle has an engine for and the machine can run.",
)
max_len_option = click.option("--max-len", type=int, help="Tokens of context: prompt, pictures and answer.")
threads_option = click.option(
    "--threads", type=int, help="ONNX Runtime's, of one operator; by default one a physical core."
)
answering_options = options_as_one(
    "answering",
    Answering,
    click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer."),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."),
    click.option("--top-k", type=int, help="Draw from this many tokens only."),
    click.option("--top-p", type=float, help="Draw from the likeliest tokens that reach this probability."),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: repeat less."),
    click.option("--seed", type=int, help="Draw the same every time."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable."),
    backend_option,
    max_len_option,
    threads_option,
)
images_option = click.option(
    "--image", "images", multiple=True, metavar="PICTURE", help="Path, data URI, or - for standard input; repeatable."
)
raw_option = click.option("--raw", is_flag=True, help="Take the prompt as it is, without the model's template.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load_pictures(sources: tuple[str, ...]) -> list[Image]:
    """Load pictures: a wrong path is known before a model is loaded."""
    from llava_deploy.runtime.pictures import load_picture

    return [load_picture(sys.stdin.buffer.read() if source == "-" else source) for source in sources]

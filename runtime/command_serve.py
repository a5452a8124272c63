"""What ``serve`` asks for, and what it does. Nothing heavy is imported before it runs."""

from __future__ import annotations

import functools
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_deploy.runtime.command_group import examples, options_as_one, quiet, say
from llava_deploy.runtime.command_options import PATH, backend_option, load_bundle, max_len_option, threads_option

if TYPE_CHECKING:
    from llava_deploy.runtime.backend_choice import BackendName
    from llava_deploy.runtime.serve.service import ServeOptions

_DEFAULT_NEW_TOKENS = 256
_MEGABYTE = 1 << 20
_CHARACTERS = 256  # a token of context: far more than any has, where text is text


@dataclass(frozen=True)
class ServeRequest:
    """Where a service listens and what it takes on."""

    socket: Path
    mode: int
    pictures: Path | None
    max_new_tokens: int
    max_images: int
    max_request: int
    waiting: int
    clients: int
    patience: int
    step: int
    backend: BackendName
    max_len: int | None
    threads: int | None

    def options(self, max_len: int) -> ServeOptions:
        """What it takes on, of a model with ``max_len`` tokens of context."""
        from llava_deploy.runtime.serve.requests import Allowed
        from llava_deploy.runtime.serve.service import ServeOptions

        default = min(_DEFAULT_NEW_TOKENS, self.max_new_tokens)
        allowed = Allowed(self.max_new_tokens, default, self.max_images, self.pictures, _CHARACTERS * max_len)
        line = self.max_request * _MEGABYTE
        return ServeOptions(allowed, self.waiting, self.clients, line, float(self.patience), float(self.step))


class _Mode(click.ParamType):
    """A file's mode, in octal."""

    name = "mode"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """To the number."""
        if isinstance(value, int):
            return value
        text = str(value)
        if not (text.isascii() and text.isdigit() and set(text) <= set("01234567") and int(text, 8) <= 0o777):
            self.fail(f"want a mode in octal, 600 to 777 as chmod takes it, got {text!r}", param, ctx)
        return int(text, 8)


_options = options_as_one(
    "request",
    ServeRequest,
    click.option("--socket", type=PATH, required=True, help="Unix socket to listen on."),
    click.option("--mode", type=_Mode(), default="660", show_default=True, help="Of the socket: who may connect."),
    click.option("--pictures", type=PATH, metavar="DIR", help="Requests may name files below it."),
    click.option("--max-new-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Of one answer."),
    click.option("--max-images", type=click.IntRange(0), default=16, show_default=True, help="Of one request."),
    click.option(
        "--max-request", type=click.IntRange(1, 1024), default=16, show_default=True, help="MiB of one request."
    ),
    click.option(
        "--waiting", type=click.IntRange(0, 1000), default=8, show_default=True, help="Requests that may wait."
    ),
    click.option("--clients", type=click.IntRange(1, 1000), default=16, show_default=True, help="Connections at once."),
    click.option(
        "--patience",
        type=click.IntRange(1),
        default=300,
        show_default=True,
        help="Seconds that a client has for a line.",
    ),
    click.option(
        "--step", type=click.IntRange(1), default=300, show_default=True, help="Seconds until an answer must move."
    ),
    backend_option,
    max_len_option,
    threads_option,
)


@click.command("serve", epilog=examples("serve bundle --socket /run/user/1000/llava.sock"))
@click.argument("bundle", type=PATH)
@_options
def serve(bundle: Path, request: ServeRequest) -> None:
    """Keep a bundle loaded, and answer over a Unix socket.

    A request is a line of JSON: {"prompt": "What is this?", "images": ["data:image/jpeg;base64,..."]}, or with
    "messages" in its place. The answer comes as lines {"text": ...}, then {"done": true, ...}; {"error": ...} leaves
    the connection open. One request is answered at a time, others wait. There is no network port: who may ask is a
    matter of the socket's mode and of its directory's.
    """
    from llava_deploy.engines.errors import OptionError
    from llava_deploy.runtime.serve.service import Service
    from llava_deploy.runtime.serve.sockets import claimed, listen, notify

    if request.pictures is not None and not request.pictures.is_dir():
        raise OptionError("pictures", f"want a directory, found none at {request.pictures}")
    with claimed(request.socket):
        llava = load_bundle(bundle, request.backend, request.max_len, request.threads)
        log = _silent if quiet() else functools.partial(click.secho, err=True, dim=True)
        service = Service(llava, request.options(llava.max_len), log)
        listener = listen(request.socket, request.mode)
        say(f"listening on {request.socket}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.stop())
        ended = service.run(listener, functools.partial(notify, os.environ))
    if not ended:
        # The model computes on in its thread, which the interpreter cannot end without waiting for it.
        sys.stderr.flush()
        os._exit(0)


def _silent(text: str) -> None:
    """Of a service with ``--quiet``, its clients know."""

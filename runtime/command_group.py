"""A click group whose errors are one line. It imports nothing of the rooms, so that ``--help`` comes at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from llava_deploy.engines.errors import InputError, LlavaDeployError, OptionError
from llava_deploy.runtime.printable import ESCAPES, printable, register_escapes

PROGRAM = "llava-deploy"
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
Command = Callable[..., None]
_EXPORT_EXTRA = {"ml_dtypes", "onnx", "onnx_ir", "onnxscript", "polygraphy", "safetensors", "torch", "transformers"}


@contextlib.contextmanager
def _one_line_errors(context: click.Context) -> Iterator[None]:
    """Turn exceptions into one line and an exit code, after the traceback with ``--debug``."""
    try:
        yield
    except (click.exceptions.Exit, click.exceptions.NoArgsIsHelpError, BrokenPipeError):
        raise
    except (KeyboardInterrupt, click.Abort) as error:
        click.echo(err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from error
    except click.ClickException as error:
        used = getattr(error, "ctx", None) or context
        message = " ".join(error.format_message().splitlines())
        _report(f"{message} See: {used.command_path} --help")
        raise click.exceptions.Exit(InputError.exit_code) from error
    except Exception as error:
        if context.meta.get("debug"):
            traceback.print_exc()
        message, exit_code = failure(error)
        _report(message)
        raise click.exceptions.Exit(exit_code) from error


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end a command as Ctrl-C does: what it had begun to write is removed.

    A signal that is ignored stays so (nohup), and a thread that is not the main one has none.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # as shells have it


def _report(message: str) -> None:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {printable(message)}", err=True)


def refuse_given(reason: str, *names: str) -> None:
    """Refuse options that were given on the command line and would have no effect.

    Raises:
        click.UsageError: one of ``names``, as the command's function calls them, was given.
    """
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        flags = ", ".join(map(_flag, given))
        raise click.UsageError(f"{flags}: {reason}; leave it out.", context)


def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Callback of an option that is the same before and after the command's name."""
    if value and parameter.name is not None:
        context.meta[parameter.name] = True


class CommandLine(click.Group):
    """Errors are one line; every command has ``--quiet`` and ``--debug``."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, with the options that all have."""
        flags = (("-q", "--quiet", "Say nothing but the result."), ("--debug", "Show an error's traceback."))
        for *names, text in flags:
            cmd.params.append(click.Option(names, is_flag=True, expose_value=False, callback=remember, help=text))
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's own signature)
        """In the order in which they are declared, which is the order in which people need them."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what stands before the command's name."""
        with _one_line_errors(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the command's arguments and run it."""
        if os.environ.get("NO_COLOR"):
            ctx.color = False  # https://no-color.org; Rich knows it by itself
        _open_closed_streams()
        register_escapes()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=ESCAPES)  # what a terminal cannot show is no reason to fail
        with _ended_in_order(), _one_line_errors(ctx):
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe shows here, not while Python shuts down
            return result


def say(text: str) -> None:
    """A line for people, on standard error."""
    if not quiet():
        click.secho(printable(_line(text)), err=True, dim=True)


def quiet() -> bool:
    """Whether the command that runs was given ``--quiet``."""
    return bool(click.get_current_context().meta.get("quiet"))


def failure(error: Exception) -> tuple[str, int]:
    """The line and the exit code: 2 for what the caller can put right, 1 for the rest.

    What is neither one of our errors nor the machine's (files, memory, a missing extra) is a bug, and said to be one.
    """
    if isinstance(error, OptionError):
        return _line(f"{_flag(error.option)}: {error.reason}"), error.exit_code
    if isinstance(error, LlavaDeployError):
        return _line(str(error)), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        module = error.name.partition(".")[0]
        if module in _EXPORT_EXTRA:
            return (
                f"this needs {module}, which is not installed; install it with: pip install 'llava-deploy[export]'",
                1,
            )
    if isinstance(error, MemoryError):
        return "the machine has too little memory for this; try a smaller --max-len or --batch, or fp16", 1
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_directory():
        return "the directory that this was called in is gone; change to one that is there", 1
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return _line(f"{where}{error.strerror}"), 1
    what = _line(f"{type(error).__name__}: {error}")
    return f"{what} (a bug in llava-deploy: run it again with --debug, and report what that prints)", 1


def _has_directory() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _open_closed_streams() -> None:
    """Put the null device where the caller has closed a standard stream, or a file of ours would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _line(text: str) -> str:
    return " ".join(text.splitlines())


def examples(*lines: str) -> str:
    r"""End of a command's help; click leaves the lines after ``\b`` as they are."""
    return "\b\nExample:\n" + "\n".join(f"  {PROGRAM} {line}" for line in lines)


def options_as_one(name: str, kind: type[Any], *options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options that a command gets as one argument, ``name``, of the dataclass ``kind``."""
    fields = [field.name for field in dataclasses.fields(kind)]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def gathering(**values: Any) -> None:
            gathered = kind(**{field: values.pop(field) for field in fields})
            command(**values, **{name: gathered})

        decorated: Command = gathering
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate

"""What ``bench`` asks for, and what it does. Nothing heavy is imported before it runs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llava_deploy.engines.errors import InputError, LlavaDeployError, OptionError
from llava_deploy.runtime.bench.options import QUESTION_TOKENS, QUICK, STANDARD, BenchOptions
from llava_deploy.runtime.command_group import options_as_one, quiet, say
from llava_deploy.runtime.command_options import PATH, backend_option, max_len_option, threads_option

if TYPE_CHECKING:
    from llava_deploy.runtime.backend_choice import BackendName
    from llava_deploy.runtime.bench.bench import BoundOf
    from llava_deploy.runtime.bench.report import Report

STANDARD_OUTPUT = Path("-")


@dataclass(frozen=True)
class BenchRequest:
    """What to measure, with what, and where the result goes; ``None`` leaves it to the standard or the machine."""

    backend: BackendName
    threads: int | None
    max_len: int | None
    prompt_tokens: int | None
    contexts: tuple[int, ...] | None
    batches: tuple[int, ...] | None
    new_tokens: int | None
    rounds: int | None
    quick: bool
    json: Path | None
    plot: Path | None
    compare: Path | None

    def options(self) -> BenchOptions:
        """What to measure.

        Raises:
            OptionError: a number that cannot be.
        """
        base = QUICK if self.quick else STANDARD
        return replace(
            base,
            prompt_tokens=self.prompt_tokens,
            contexts=base.contexts if self.contexts is None else self.contexts,
            batches=base.batches if self.batches is None else self.batches,
            new_tokens=base.new_tokens if self.new_tokens is None else self.new_tokens,
            rounds=base.rounds if self.rounds is None else self.rounds,
        )


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _numbers(context: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """``64,512`` as numbers."""
    if value is None:
        return None
    try:
        return tuple(int(number) for number in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"want numbers with commas between them, got {value!r}.", context, option) from error


bench_options = options_as_one(
    "request",
    BenchRequest,
    backend_option,
    threads_option,
    max_len_option,
    click.option(
        "--prompt-tokens",
        type=int,
        help=f"Of the prompt whose first token is timed; by default a picture and {QUESTION_TOKENS}.",
    ),
    click.option(
        "--contexts",
        callback=_numbers,
        metavar="N,N,...",
        help=f"Tokens to decode behind; {_listed(STANDARD.contexts)} by default.",
    ),
    click.option(
        "--batches",
        callback=_numbers,
        metavar="N,N,...",
        help=f"Rows at once; {_listed(STANDARD.batches)} by default.",
    ),
    click.option("--new-tokens", type=int, help=f"Of each answer; {STANDARD.new_tokens} by default."),
    click.option("--rounds", type=int, help=f"Times that everything takes its turn; {STANDARD.rounds} by default."),
    click.option("--quick", is_flag=True, help="A look: one round, shorter answers, fewer contexts and batches."),
    click.option("--json", type=PATH, metavar="FILE", help="Write everything there; - for standard output alone."),
    click.option("--plot", type=PATH, metavar="FILE", help="Draw it: .png or .svg. Needs the extra [bench]."),
    click.option("--compare", type=PATH, metavar="FILE", help="Put it beside what --json wrote before."),
)


def run_bench(bundle: Path, request: BenchRequest, bound_of: BoundOf) -> None:
    """Measure a bundle, and show and write what was found; ``bound_of`` is the planner's.

    Raises:
        OptionError: an option that cannot be had; before anything is measured where that can be seen.
        InputError: what is to be compared with cannot be read, or has nothing in common.
        BundleError: no bundle, or a damaged one.
        BackendError: the backend cannot be had, or fails.
        LlavaDeployError: the result cannot be written.
    """
    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.backend_choice import Wanted
    from llava_deploy.runtime.bench.bench import run_benchmark
    from llava_deploy.runtime.bench.plot import require_plot, write_plot
    from llava_deploy.runtime.bench.report import read_report
    from llava_deploy.runtime.terminal_bench import comparison_table, report_tables

    options = request.options()
    _require_places(request)
    if request.plot is not None:
        require_plot(request.plot)
    before = None if request.compare is None else read_report(request.compare)
    watch = terminal.Stopwatch()
    with terminal.progress("measuring", quiet=quiet()) as step:
        wanted = Wanted(request.backend, request.max_len, request.threads)
        report = run_benchmark(bundle, wanted, options, bound_of, step)
    if request.json is not None:
        _write(report, request.json)
    if request.plot is not None:
        write_plot(report, request.plot)
    if request.json != STANDARD_OUTPUT:
        terminal.show(report_tables(report))
    if before is not None:
        from llava_deploy.runtime.bench.compare import compare

        terminal.show(comparison_table(compare(report, before), str(request.compare)))
    say(f"measured in {watch}")


def _require_places(request: BenchRequest) -> None:
    """Refuse places that nothing can be written to, before minutes are spent."""
    if request.compare is not None and request.json == STANDARD_OUTPUT:
        raise OptionError("json", "want a file beside --compare, whose table is what standard output gets; got -")
    for option, path in (("json", request.json), ("plot", request.plot)):
        if path is None or path == STANDARD_OUTPUT:
            continue
        if path.is_dir() or not path.parent.is_dir():
            found = "a directory" if path.is_dir() else f"no directory {path.parent}"
            raise OptionError(option, f"want a file to write, found {found}; name another")
        if not os.access(path.parent, os.W_OK):
            raise OptionError(option, f"want a file to write, and {path.parent} lets none be made; name another")
    if request.plot is not None and request.plot == request.json:
        raise InputError(f"{request.plot}: --json and --plot name the same file; name two")


def _write(report: Report, path: Path) -> None:
    if path == STANDARD_OUTPUT:
        sys.stdout.write(report.to_json())
        return
    from llava_deploy.runtime.bench.whole_file import whole_file

    try:
        with whole_file(path) as place:
            place.write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        raise LlavaDeployError(f"{path}: the result cannot be written ({error.strerror}); name another file") from error

"""What ``report`` asks for, and what it does. Nothing heavy is imported before it runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click

from llava_deploy.engines.errors import LlavaDeployError, OptionError
from llava_deploy.runtime.command_group import options_as_one, quiet, refuse_given, say
from llava_deploy.runtime.command_options import PATH, backend_option, threads_option

if TYPE_CHECKING:
    from llava_deploy.runtime.backend_choice import BackendName
    from llava_deploy.runtime.bench.bench import BoundOf
    from llava_deploy.runtime.evaluation import Question
    from llava_deploy.runtime.report.record import Record

Drawn: TypeAlias = "tuple[Sequence[Question], Mapping[str, float]]"
"""Questions, and what guessing gets right of each kind."""

PER_KIND = 100
QUICK_PER_KIND = 5


@dataclass(frozen=True)
class ReportRequest:
    """What to measure, with what, and where it goes; ``source`` is a result to be rendered again."""

    output: Path | None
    json: Path | None
    source: Path | None
    data: Path | None
    per_kind: int | None
    quick: bool
    title: str | None
    backend: BackendName
    threads: int | None

    @property
    def questions_per_kind(self) -> int:
        """Drawn questions of each kind."""
        if self.per_kind is not None:
            return self.per_kind
        return QUICK_PER_KIND if self.quick else PER_KIND


report_options = options_as_one(
    "request",
    ReportRequest,
    click.option("-o", "--output", type=PATH, metavar="FILE", help="The page to write, report.html."),
    click.option("--json", type=PATH, metavar="FILE", help="Write everything that was measured there."),
    click.option("--from", "source", type=PATH, metavar="FILE", help="Measure nothing: make the page of such a JSON."),
    click.option("--data", type=PATH, metavar="FILE", help='JSON lines {"image", "question", "answer"[, "kind"]}.'),
    click.option(
        "--per-kind", type=int, help=f"Drawn questions of each kind; {PER_KIND}, {QUICK_PER_KIND} with --quick."
    ),
    click.option("--quick", is_flag=True, help="A look: fewer questions, one round, shorter answers."),
    click.option("--title", help="What the report is of; by default the first bundle's model."),
    backend_option,
    threads_option,
)


def run_report(
    bundles: tuple[Path, ...],
    request: ReportRequest,
    drawn: Callable[[int], Drawn],
    bound_of: Callable[[Path], BoundOf],
) -> None:
    """Measure bundles, or read what was measured, and write the page and the JSON.

    Args:
        bundles: directories; none where a result is rendered again.
        request: what was asked for.
        drawn: so many drawn questions of each kind.
        bound_of: a bundle's directory to what a bandwidth allows of decoding it: the planner's.

    Raises:
        OptionError: an option that cannot be had; before anything is measured where that can be seen.
        InputError: the bundles are not of one model, or what is to be rendered again cannot be read.
        BundleError: one is no bundle, or damaged.
        BackendError: the backend cannot be had, or fails.
        LlavaDeployError: a file cannot be written.
    """
    from llava_deploy.runtime import terminal
    from llava_deploy.runtime.report.figures import require_figures
    from llava_deploy.runtime.report.record import read_record

    _require_places(request)
    if request.output is not None:
        require_figures()
    if request.source is not None:
        refuse_given("of no effect with --from", "json", "data", "per_kind", "quick", "title", "backend", "threads")
        if bundles:
            raise OptionError("from", "want no bundle beside it, as nothing is measured; leave one of both out")
        _write(read_record(request.source), request)
        return
    if not bundles:
        raise click.UsageError("Missing argument 'BUNDLE', or --from FILE.", click.get_current_context())
    if request.data is not None:
        refuse_given("of no effect with --data, whose questions are all asked", "per_kind")
    from llava_deploy.runtime.evaluation import read_questions
    from llava_deploy.runtime.report.collect import Exam, ReportOptions, collect
    from llava_deploy.runtime.report.page import headline

    watch = terminal.Stopwatch()
    options = ReportOptions(request.title, request.backend, request.threads, request.quick)
    stage = functools.partial(terminal.progress, quiet=quiet())
    if request.data is None:
        exam = Exam(*drawn(request.questions_per_kind), "drawn pictures")
    else:
        exam = Exam(read_questions(request.data), {}, request.data.name)
    record = collect(bundles, exam, options, bound_of, stage)
    _write(record, request)
    say(f"{headline(record)} Measured in {watch}")


def _require_places(request: ReportRequest) -> None:
    """Refuse places that nothing can be written to, before minutes are spent."""
    if request.output is None and (request.json is None or request.source is not None):
        raise OptionError("output", "want a file to write, got none; name one: -o report.html")
    for option, path in (("output", request.output), ("json", request.json)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            found = "a directory" if path.is_dir() else f"no directory {path.parent}"
            raise OptionError(option, f"want a file to write, found {found}; name another")
        if path is not None and not os.access(path.parent, os.W_OK):
            raise OptionError(option, f"want a file to write, and {path.parent} lets none be made; name another")
    if request.output is not None and request.output == request.json:
        raise OptionError("json", f"want another file than that of the page, got {request.json}")


def _write(record: Record, request: ReportRequest) -> None:
    """The JSON first: it cost the time, and the page can be made of it again."""
    if request.json is not None:
        _write_whole(request.json, record.to_json())
    if request.output is not None:
        from llava_deploy.runtime.report.page import render

        _write_whole(request.output, render(record))
        click.echo(request.output)


def _write_whole(path: Path, text: str) -> None:
    from llava_deploy.runtime.bench.whole_file import whole_file

    try:
        with whole_file(path) as place:
            place.write_text(text, encoding="utf-8", errors="replace")  # names of files may be no text
    except OSError as error:
        raise LlavaDeployError(f"{path}: the report cannot be written ({error.strerror}); name another file") from error

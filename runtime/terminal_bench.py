"""A benchmark's result as tables, and beside another one."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llava_deploy.runtime.bench.compare import Beside, Quantity
from llava_deploy.runtime.bench.report import Bandwidth, Decode, FirstToken, Machine, Memory, Report, Samples
from llava_deploy.runtime.terminal import facts, seconds, size
from llava_deploy.runtime.terminal_eval import quantization_words

_PARTS = ("preprocess", "vision", "splice", "prefill", "rest")
_STYLES = {"better": "green", "worse": "red", "within the spread": "dim"}


def report_tables(report: Report) -> Group:
    """Everything that was measured, medians with the least and the most in brackets."""
    tables: list[RenderableType] = [
        _head(report),
        _first_token(report.first_token),
        _decode("Decode behind a context, one row", report.decode),
    ]
    if any(decode.batch > 1 for decode in report.batches):
        tables.append(_batches(report.batches))
    if report.memory:
        tables.append(_memory(report.memory))
    return Group(*tables, *_remarks(report.remarks))


def comparison_table(beside: Beside, before: str) -> Group:
    """This result beside another, whose name is ``before``."""
    table = _table(f"Beside {before}")
    for name in ("", "before", "now", "now / before", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for quantity in beside.quantities:
        ratio = "" if quantity.ratio is None else f"{quantity.ratio:.2f}"
        verdict = Text(quantity.verdict, _STYLES[quantity.verdict])
        table.add_row(quantity.name, *(_of(quantity, each) for each in (quantity.before, quantity.now)), ratio, verdict)
    return Group(table, *[Text(f"doubtful: {doubt}", "yellow") for doubt in beside.doubts])


def _head(report: Report) -> Table:
    bundle, backend = report.bundle, report.backend
    made = ", ".join([bundle.precision, *quantization_words(bundle.quantization)])
    return facts(
        f"Benchmark of {bundle.directory}",
        [
            ("model", f"{bundle.name}, {bundle.parameters:,} parameters in {made}, {size(bundle.weight_bytes)}"),
            ("backend", f"{backend.reason}; loaded in {seconds(backend.load_seconds)}, {backend.max_len} slots"),
            ("machine", _machine(report.machine)),
            ("memory", _bandwidth(report.bandwidth)),
            ("measured", f"{report.date}, {_count(report.options.rounds, 'round')}: median (least - most)"),
        ],
    )


def _machine(machine: Machine) -> str:
    cores = f"{_count(machine.physical_cores, 'core')}, {_count(machine.logical_cpus, 'processor')} for this process"
    known = [] if machine.memory is None else [f"{size(machine.memory)} of memory"]
    return ", ".join([*([] if machine.gpu is None else [machine.gpu]), machine.cpu, cores, *known])


def _bandwidth(bandwidth: Bandwidth) -> str:
    rate = _spread(bandwidth.bytes_per_second, 1e-9, 1)
    how = f"read by {_count(bandwidth.threads, 'thread')}" if bandwidth.kind == "host read" else "copied on the GPU"
    return f"{rate} GB/s, {how}"


def _first_token(first: FirstToken) -> Table:
    shown = "with one picture" if first.pictures else "of text"
    table = _table(f"First token of a prompt of {first.prompt_tokens} tokens {shown}, ms")
    for name in (*_PARTS, "together", "prefill, tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    speed = f"{first.prompt_tokens / first.prefill.median:.0f}" if first.prefill.median else ""
    cells = [_spread(getattr(first, name), 1e3, 1) for name in (*_PARTS, "total")]
    table.add_row(*cells, speed)
    return table


def _decode(title: str, decodes: Sequence[Decode]) -> Table:
    table = _table(title)
    for name in ("context", "tokens/s", "ms a token", "a step reads", "limit, tokens/s", "of the limit", "Python, µs"):
        table.add_column(name, justify="right", no_wrap=True)
    for decode in decodes:
        table.add_row(
            str(decode.context),
            _spread(decode.tokens_per_second, 1.0, 1),
            f"{1e3 / decode.tokens_per_second.median:.2f}",
            *_limit(decode),
        )
    return table


def _batches(batches: Sequence[Decode]) -> Table:
    table = _table(f"Rows at once, each behind {batches[0].context} tokens")
    names = ("rows", "tokens/s of all", "per row", "a step reads", "limit, tokens/s", "of the limit", "Python, µs")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for decode in batches:
        per_row = f"{decode.tokens_per_second.median / decode.batch:.1f}"
        table.add_row(str(decode.batch), _spread(decode.tokens_per_second, 1.0, 1), per_row, *_limit(decode))
    return table


def _limit(decode: Decode) -> tuple[str, ...]:
    python = f"{1e6 * decode.python_seconds.median:.0f}"
    return size(decode.step_bytes), f"{decode.limit:.1f}", f"{decode.share:.0%}", python


def _memory(memory: Sequence[Memory]) -> Table:
    table = _table("Peak memory of the process")
    table.add_column("while")
    on_device = any(peak.device is not None for peak in memory)
    for name in ("anonymous", "mapped files", *(["GPU"] if on_device else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for peak in memory:
        device = [] if not on_device else ["" if peak.device is None else size(peak.device)]
        table.add_row(peak.phase, size(peak.anonymous), size(peak.mapped), *device)
    return table


def _remarks(remarks: Sequence[str]) -> list[Text]:
    return [Text(f"note: {remark}", "yellow") for remark in remarks]


def _of(quantity: Quantity, samples: Samples) -> str:
    return f"{_spread(samples, quantity.scale, 1)} {quantity.unit}"


def _spread(samples: Samples, scale: float, digits: int) -> str:
    """``12.3 (11.9 - 14.0)``; of one sample, that."""
    middle, least, most = (f"{scale * value:.{digits}f}" for value in (samples.median, samples.least, samples.most))
    return middle if len(samples.each) == 1 else f"{middle} ({least} - {most})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _table(title: str) -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")

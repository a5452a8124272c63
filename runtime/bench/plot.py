"""A benchmark's result as a picture. matplotlib is imported where one is asked for, and its settings are left alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_deploy.engines.errors import LlavaDeployError, OptionError
from llava_deploy.runtime.bench.report import Decode, FirstToken, Report
from llava_deploy.runtime.bench.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
_PAPER, _INK, _FAINT = "#ffffff", "#1b1f24", "#d5d9de"
"""The picture brings its own ground, so that it looks the same on a light page and on a dark one."""

_DECODE, _LIMIT = "#0b62a4", "#b3372f"
_PARTS = {
    "preprocess": "#8c959f",
    "vision": "#d98e04",
    "splice": "#6b4fa0",
    "prefill": "#0b62a4",
    "rest": "#2b7a4b",
}
_WORDS = {"rest": "rest (Python)"}
_SIZE = (11.0, 3.8)  # inches
_DPI = 160


def require_plot(path: Path) -> None:
    """Make sure that a plot can be written, before anything is measured.

    Raises:
        OptionError: neither PNG nor SVG, no such directory, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError("plot", f"want a name that ends with {' or '.join(FORMATS)}, got {path}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        reason = f"matplotlib cannot be imported ({error}); install it with: pip install 'llava-deploy[bench]'"
        raise OptionError("plot", reason) from error


def write_plot(report: Report, path: Path) -> None:
    """Draw decoding against context and its limit, the parts of the first token, and batches.

    Raises:
        OptionError: as :func:`require_plot`.
        LlavaDeployError: the file cannot be written.
    """
    require_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "llava-deploy", "text.color": _INK}):
        figure = Figure(figsize=_SIZE, facecolor=_PAPER, layout="constrained")
        draws: list[Callable[[Axes], None]] = [
            lambda axes: _draw_contexts(axes, report.decode),
            lambda axes: _draw_first_token(axes, report.first_token),
        ]
        if any(decode.batch > 1 for decode in report.batches):
            draws.append(lambda axes: _draw_batches(axes, report.batches))
        for axes, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
            _plain(axes)
            draw(axes)
        figure.suptitle(_title(report), fontsize=10, color=_INK)
        try:
            with whole_file(path) as place:
                figure.savefig(place, dpi=_DPI, format=path.suffix.lower()[1:], metadata=_undated(path))
        except OSError as error:
            raise LlavaDeployError(
                f"{path}: the plot cannot be written ({error.strerror}); name another file"
            ) from error


def _undated(path: Path) -> dict[str, Any]:
    return {"Date": None} if path.suffix.lower() == ".svg" else {}


def _title(report: Report) -> str:
    machine = report.machine.cpu if report.machine.gpu is None else report.machine.gpu
    threads = "" if report.machine.gpu is not None else f", {report.bandwidth.threads} threads"
    rate = report.bandwidth.bytes_per_second.median / 1e9
    return (
        f"{report.bundle.name} in {report.bundle.precision}, {report.backend.name}, {machine}{threads}, "
        f"memory at {rate:.1f} GB/s"
    )


def _plain(axes: Axes) -> None:
    axes.set_facecolor(_PAPER)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(_FAINT)


def _draw_contexts(axes: Axes, decodes: Sequence[Decode]) -> None:
    at = [decode.context + decode.new_tokens // 2 for decode in decodes]
    axes.set_title("Decode, one row", fontsize=9, loc="left")
    limits = [decode.limit for decode in decodes]
    axes.plot(at, limits, color=_LIMIT, linestyle="--", marker="_", label="limit by bandwidth")
    _measured(axes, at, decodes, "decode")
    axes.set_xlabel("tokens in the cache")
    axes.set_xticks(at)
    _rates(axes)
    axes.set_xlim(left=0, right=1.08 * max(at))


def _draw_batches(axes: Axes, decodes: Sequence[Decode]) -> None:
    at = [decode.batch for decode in decodes]
    axes.set_title(f"Rows at once, behind {decodes[0].context} tokens", fontsize=9, loc="left")
    first = decodes[0].tokens_per_second.median / decodes[0].batch
    axes.plot(
        at, [first * rows for rows in at], color=_INK, linewidth=0.8, linestyle=":", label="in proportion to rows"
    )
    _measured(axes, at, decodes, "all rows")
    axes.set_xlabel("rows")
    axes.set_xticks(at)
    _rates(axes)


def _measured(axes: Axes, at: Sequence[int], decodes: Sequence[Decode], label: str) -> None:
    """Medians, with bars from the least to the most."""
    rates = [decode.tokens_per_second for decode in decodes]
    bars = [[rate.median - rate.least for rate in rates], [rate.most - rate.median for rate in rates]]
    middles = [rate.median for rate in rates]
    axes.errorbar(at, middles, bars, color=_DECODE, marker="o", markersize=4, capsize=3, label=label)


def _rates(axes: Axes) -> None:
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.yaxis.grid(visible=True, color=_FAINT, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=_INK)


def _draw_first_token(axes: Axes, first: FirstToken) -> None:
    shown = "with a picture" if first.pictures else "of text"
    axes.set_title(f"First token, {first.prompt_tokens} tokens {shown}", fontsize=9, loc="left")
    totals = first.total.each
    middle = totals.index(statistics.median_low(totals))  # parts of one round add up, medians do not
    parts = {name: 1e3 * getattr(first, name).each[middle] for name in _PARTS}
    for row, (name, took) in enumerate(parts.items()):
        axes.barh(row, took, left=sum(list(parts.values())[:row]), color=_PARTS[name], height=0.6)
    total = sum(parts.values())
    ends = [sum(list(parts.values())[: row + 1]) for row in range(len(parts))]
    for row, (end, took) in enumerate(zip(ends, parts.values(), strict=True)):
        inside = end > 0.75 * total and end - took > 0.25 * total
        place = {"x": end - took - 0.02 * total, "ha": "right"} if inside else {"x": end + 0.02 * total, "ha": "left"}
        axes.text(y=row, s=f"{took:.1f}", va="center", color=_INK, **place)
    axes.set_yticks(range(len(parts)), [_WORDS.get(name, name) for name in parts])
    axes.invert_yaxis()
    axes.set_xlabel("ms, from the call on")
    axes.set_xlim(0, 1.1 * total)
    axes.xaxis.grid(visible=True, color=_FAINT, linewidth=0.6)

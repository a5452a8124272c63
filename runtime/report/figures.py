"""The figures of a report. matplotlib is imported where they are asked for, and its settings are left alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_deploy.engines.errors import OptionError
from llava_deploy.runtime.report.figure_text import (
    describe_batches,
    describe_contexts,
    describe_first_token,
    describe_memory,
    describe_roof,
)
from llava_deploy.runtime.report.palette import FAINT, GROUND, INK, RULE, SERIES, Colour
from llava_deploy.runtime.report.record import BundleRecord, Record, Walk
from llava_deploy.runtime.report.svg import inline_svg
from llava_deploy.runtime.report.timed import PARTS, Timed, figure_label, middle_round, timed_of
from llava_deploy.runtime.report.units import three

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 5.4  # inches
_MARKERS = "os^Dv"
_TICKS_APART = 0.08  # of an axis
_FEWEST_TICKS = 3
_ROUND = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(digit / 10 for digit in range(10, 100, 2)))
_PHASES = {"load": SERIES[0], "picture": SERIES[4], "prefill": SERIES[1], "decode": SERIES[2]}
_RC: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK.stand_in,
    "text.parse_math": False,  # a name with dollars is a name
    "axes.edgecolor": RULE.stand_in,
    "axes.labelcolor": INK.stand_in,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": "cycler('color', ['#020201'])",
    "figure.facecolor": "none",
    "grid.color": RULE.stand_in,
    "grid.linewidth": 0.6,
    "xtick.color": INK.stand_in,
    "ytick.color": INK.stand_in,
    "xtick.major.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.borderaxespad": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Drawn:
    """One figure: its element's text, and what stands below it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Figures:
    """All of them; ``None`` where there is nothing to show."""

    first_token: Drawn | None
    contexts: Drawn | None
    batches: Drawn | None
    roof: Drawn | None
    memory: Drawn | None


def require_figures() -> None:
    """Make sure that figures can be drawn, before anything is measured.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        remedy = "pip install 'llava-deploy[bench]'; --json FILE without -o needs none"
        raise OptionError("output", f"matplotlib cannot be imported ({error}); install it with: {remedy}") from error


def draw(record: Record) -> Figures:
    """Draw what was measured.

    Raises:
        OptionError: matplotlib is not installed.
    """
    require_figures()
    timed = timed_of(record)
    walked = [(one, one.walk) for one in record.bundles if one.walk is not None and one.walk.samples]
    return Figures(
        first_token=_first_token(timed) if timed else None,
        contexts=_contexts(timed) if timed else None,
        batches=_batches(timed) if any(len(one.speed.batches) > 1 for one in timed) else None,
        roof=_roof(timed) if timed else None,
        memory=_memory(walked) if walked else None,
    )


@contextmanager
def _figure(height: float, rows: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    with matplotlib.rc_context(_RC):
        figure = NewFigure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False, sharey=True)[:, 0]
        yield figure, list(axes)


def _first_token(timed: Sequence[Timed]) -> Drawn:
    with _figure(0.95 + 0.42 * len(timed)) as (figure, (axes,)):
        longest = max(sum(middle_round(one.speed.first_token).values()) for one in timed)
        for row, one in enumerate(timed):
            left = 0.0
            for (name, took), colour in zip(middle_round(one.speed.first_token).items(), SERIES, strict=True):
                label = PARTS[name] if row == 0 else None
                edge: dict[str, Any] = {"edgecolor": GROUND.stand_in, "linewidth": 0.8}
                axes.barh(row, 1e3 * took, left=1e3 * left, height=0.62, color=colour.stand_in, label=label, **edge)
                left += took
            axes.text(1e3 * (left + 0.012 * longest), row, f"{three(1e3 * left)}", va="center")
        axes.set_yticks(range(len(timed)), [one.label for one in timed])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.13e3 * longest)
        axes.set_xlabel("ms")
        axes.xaxis.grid(visible=True)
        axes.spines["left"].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=5, handlelength=0.9, columnspacing=1.0)
        text = describe_first_token(timed)
        return Drawn(inline_svg(figure, "first-token", *text[:2]), text[2])


def _contexts(timed: Sequence[Timed]) -> Drawn:
    with _figure(2.9) as (figure, (axes,)):
        at: set[int] = set()
        for one, colour, marker in _styled(timed):
            slots = [decode.context + decode.new_tokens // 2 for decode in one.speed.decode]
            at |= {*slots}
            rates = [decode.tokens_per_second for decode in one.speed.decode]
            _line(axes, slots, rates, colour, marker, one.label)
            limits = [decode.limit for decode in one.speed.decode]
            axes.plot(slots, limits, color=colour.stand_in, linestyle=":", linewidth=1.1, alpha=0.85)
        axes.set_xlabel("tokens in the cache")
        axes.set_xticks(_apart(sorted(at)))
        axes.set_xlim(0, 1.06 * max(at))
        _rates(axes, len(timed))
        text = describe_contexts(timed)
        return Drawn(inline_svg(figure, "contexts", *text[:2]), text[2])


def _batches(timed: Sequence[Timed]) -> Drawn:
    with _figure(2.9) as (figure, (axes,)):
        rows: set[int] = set()
        for one, colour, marker in _styled(timed):
            at = [decode.batch for decode in one.speed.batches]
            rows |= {*at}
            first = one.speed.batches[0].tokens_per_second.median / at[0]
            _line(axes, at, [decode.tokens_per_second for decode in one.speed.batches], colour, marker, one.label)
            axes.plot(
                at, [first * count for count in at], color=colour.stand_in, linestyle=":", linewidth=1.1, alpha=0.85
            )
        axes.set_xlabel("questions at once")
        axes.set_xticks(sorted(rows))
        axes.set_xlim(0, 1.06 * max(rows))
        _rates(axes, len(timed))
        text = describe_batches(timed)
        return Drawn(inline_svg(figure, "batches", *text[:2]), text[2])


def _roof(timed: Sequence[Timed]) -> Drawn:
    from matplotlib.ticker import FixedLocator, NullLocator

    with _figure(3.1) as (figure, (axes,)):
        read = [decode.step_bytes for one in timed for decode in one.decodes]
        ends = [min(read) / 1.5, max(read) * 1.5]
        rates = [one.speed.bandwidth.bytes_per_second.median for one in timed]
        roof, low, high = sorted(rates)[len(rates) // 2], min(rates), max(rates)
        if high > low:
            least, most = ([rate / end for end in ends] for rate in (low, high))
            axes.fill_between([end / 1e6 for end in ends], least, most, color=FAINT.stand_in, alpha=0.2, linewidth=0)
        line = [roof / end for end in ends]
        label = f"memory at {three(roof / 1e9)} GB/s"
        axes.plot([end / 1e6 for end in ends], line, color=FAINT.stand_in, linestyle="--", label=label)
        for one, colour, marker in _styled(timed):
            for batched in (False, True):
                points = [decode for decode in one.decodes if (decode.batch > 1) == batched]
                steps = [decode.tokens_per_second.median / decode.batch for decode in points]
                fill: dict[str, Any] = {"markerfacecolor": GROUND.stand_in} if batched else {"label": one.label}
                axes.plot(
                    [decode.step_bytes / 1e6 for decode in points], steps,
                    color=colour.stand_in, marker=marker, linestyle="none", **fill,
                )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            ticks = _log_ticks(low, high)
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_minor_locator(NullLocator())
            axis.set_ticklabels([f"{tick:,.5g}" for tick in ticks])
            axis.grid(visible=True)
        axes.set_xlabel("MB that a step reads")
        axes.set_ylabel("steps a second")
        _legend(axes, len(timed) + 1)
        text = describe_roof(timed)
        return Drawn(inline_svg(figure, "roof", *text[:2]), text[2])


def _memory(walked: Sequence[tuple[BundleRecord, Walk]]) -> Drawn:
    with _figure(0.75 + 1.25 * len(walked), len(walked)) as (figure, panels):
        for axes, (one, walk) in zip(panels, walked, strict=True):
            for phase in walk.phases:
                colour = _PHASES[phase.name].stand_in
                at, whole, anonymous = _within(walk, phase.began, phase.ended)
                label = phase.name if axes is panels[0] else None
                axes.fill_between(at, anonymous, color=colour, alpha=0.3, linewidth=0)
                axes.plot(at, whole, color=colour, label=label)
            axes.set_xlim(0, walk.phases[-1].ended)
            axes.set_ylim(bottom=0)
            axes.set_title(figure_label(one.card.label), loc="left", fontsize=9.5)
            axes.set_ylabel("MB")
            axes.yaxis.grid(visible=True)
        panels[-1].set_xlabel("seconds since loading began")
        figure.legend(loc="outside upper center", ncols=4, handlelength=1.2)
        text = describe_memory(walked)
        return Drawn(inline_svg(figure, "memory", *text[:2]), text[2])


def _within(walk: Walk, began: float, ended: float) -> tuple[list[float], list[float], list[float]]:
    """Times, all memory and the anonymous part of a phase in MB, from the last sample before it on."""
    before = [sample for sample in walk.samples if sample.at <= began][-1:]
    inside = [*before, *(sample for sample in walk.samples if began < sample.at <= ended)]
    if not inside:
        inside = [walk.samples[0]]
    at = [max(began, sample.at) for sample in inside]
    both = [(sample.anonymous + sample.mapped) / 1e6 for sample in inside]
    anonymous = [sample.anonymous / 1e6 for sample in inside]
    return [*at, ended], [*both, both[-1]], [*anonymous, anonymous[-1]]


def _styled(timed: Sequence[Timed]) -> Iterator[tuple[Timed, Colour, str]]:
    for at, one in enumerate(timed):
        yield one, SERIES[at % len(SERIES)], _MARKERS[at % len(_MARKERS)]


def _line(axes: Axes, at: Sequence[int], rates: Sequence[Any], colour: Colour, marker: str, label: str) -> None:
    """Medians, with bars from the least to the most."""
    bars = [[rate.median - rate.least for rate in rates], [rate.most - rate.median for rate in rates]]
    middles = [rate.median for rate in rates]
    axes.errorbar(at, middles, bars, color=colour.stand_in, marker=marker, capsize=2.5, elinewidth=1, label=label)


def _rates(axes: Axes, series: int) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_ylabel("tokens a second")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.grid(visible=True)
    _legend(axes, series)


def _legend(axes: Axes, entries: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=min(entries, 4), handlelength=1.6)


def _apart(at: Sequence[int]) -> list[int]:
    """Ticks that do not overlap."""
    kept: list[int] = []
    for value in at:
        if not kept or value - kept[-1] > _TICKS_APART * max(at):
            kept.append(value)
    return kept


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two: of a wide range powers of ten, of a narrow one more, so that there are three."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in _ROUND:
        ticks = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(ticks) >= _FEWEST_TICKS:
            break
    return ticks

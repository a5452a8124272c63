"""The tables of a report: the first cell of each row heads it, and each figure's numbers are in one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_deploy.runtime.bench.report import Decode
from llava_deploy.runtime.report.record import BundleRecord, Record
from llava_deploy.runtime.report.timed import PARTS, timed_of
from llava_deploy.runtime.report.units import count, milliseconds, seconds, share, signed_points, spread, three
from llava_deploy.runtime.report.verdict import device_peak, peak_bytes
from llava_deploy.runtime.terminal import size

NOTHING = "not measured"


@dataclass(frozen=True)
class Table:
    """One table; every row has as many cells as there are headings."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def side_by_side(record: Record) -> Table:
    """What a choice between the bundles hangs on, a column a bundle."""
    first = record.bundles[0]
    rows: list[tuple[str, Callable[[BundleRecord], str]]] = [
        ("verdict", lambda one: one.verdict.decision),
        ("graphs and weights", lambda one: _beside(one.card.weight_bytes, first.card.weight_bytes, size)),
        ("right answers", lambda one: _accuracy(one, first)),
        ("same next token as the first", _same_token),
        ("mean KL from the first, nats", _divergence),
        ("time to first token", lambda one: _compared(one, first, _first_token, milliseconds)),
        ("tokens/s, shortest context", lambda one: _compared(one, first, lambda each: _rate(each, 0), three)),
        ("tokens/s, longest context", lambda one: _compared(one, first, lambda each: _rate(each, -1), three)),
        ("peak memory, one question", _peak),
        ("energy a token", _energy),
        ("self-test", lambda one: one.tested.state),
    ]
    labels = tuple(one.card.label for one in record.bundles)
    cells = tuple((name, *(cell(one) for one in record.bundles)) for name, cell in rows)
    if len(labels) == 1:
        cells = tuple(row for row in cells if "the first" not in row[0])
    return Table("Side by side; × is against the first", ("", *labels), cells)


def _compared(
    one: BundleRecord,
    first: BundleRecord,
    value_of: Callable[[BundleRecord], float | None],
    shown: Callable[[float], str],
) -> str:
    value, before = value_of(one), value_of(first)
    if value is None:
        return NOTHING
    return shown(value) if before is None or one is first else _beside(value, before, shown)


def _beside(value: float, before: float, shown: Callable[[float], str]) -> str:
    ratio = "" if not before or value == before else f" ({value / before:.2f} ×)"
    return f"{shown(value)}{ratio}"


def _accuracy(one: BundleRecord, first: BundleRecord) -> str:
    if one.accuracy is None:
        return NOTHING
    said = share(one.accuracy.total.accuracy)
    if one is first or first.accuracy is None:
        return said
    return f"{said} ({signed_points(one.accuracy.total.accuracy - first.accuracy.total.accuracy)})"


def _same_token(one: BundleRecord) -> str:
    if one.accuracy is None:
        return NOTHING
    near = one.accuracy.agreement
    return "" if near is None else f"{100 * near.share:.2f} %"


def _divergence(one: BundleRecord) -> str:
    if one.accuracy is None:
        return NOTHING
    near = one.accuracy.agreement
    return "" if near is None else f"{near.mean_kl:.2g}"


def _first_token(one: BundleRecord) -> float | None:
    return None if one.speed is None else one.speed.first_token.total.median


def _rate(one: BundleRecord, at: int) -> float | None:
    return None if one.speed is None else one.speed.decode[at].tokens_per_second.median


def _peak(one: BundleRecord) -> str:
    if one.walk is None or not one.walk.samples:
        return NOTHING
    device = device_peak(one.walk)
    return size(peak_bytes(one.walk)) + ("" if device is None else f"; GPU {size(device)}")


def _energy(one: BundleRecord) -> str:
    if one.walk is None:
        return NOTHING
    return "not told" if one.energy is None else _joules(one.energy.joules_per_token)


def _joules(value: float) -> str:
    return f"{three(value)} J" if value >= 1 else f"{three(1e3 * value)} mJ"


def accuracy_table(record: Record) -> Table:
    """Right answers by kind, a column a bundle; with what guessing gets where that is known."""
    asked = [one for one in record.bundles if one.accuracy is not None]
    chance = record.asked.chance
    kinds = list(asked[0].accuracy.kinds) if asked and asked[0].accuracy is not None else []

    def cells(name: str) -> tuple[str, ...]:
        scores = [one.accuracy.kinds[name] for one in asked if one.accuracy is not None]
        guess = (share(chance[name]) if name in chance else "",) if chance else ()
        return (name, f"{scores[0].asked:,}", *(share(score.accuracy) for score in scores), *guess)

    totals = [one.accuracy.total for one in asked if one.accuracy is not None]
    rows = [cells(name) for name in kinds]
    if totals and len(kinds) > 1:
        rows.append(
            ("all", f"{totals[0].asked:,}", *(share(score.accuracy) for score in totals), *([""] if chance else []))
        )
    headings = ("kind", "asked", *(one.card.label for one in asked), *(["guessing"] if chance else []))
    return Table("Right answers by kind of question", headings, tuple(rows))


def first_token_table(record: Record) -> Table:
    """The parts of the first token, medians over rounds with their spread."""
    rows = []
    for one in timed_of(record):
        first = one.speed.first_token
        rows.append((one.label, *(spread(getattr(first, name), 1e3) for name in (*PARTS, "total"))))
    return Table("Time to the first token, ms: median (least – most)", ("", *PARTS.values(), "together"), tuple(rows))


def decode_table(record: Record) -> Table:
    """Decoding behind contexts and of batches, with its limit."""
    rows = [(one.label, *_decoded(decode)) for one in timed_of(record) for decode in one.decodes]
    headings = ("", "at once", "context", "tokens/s", "a step reads", "limit, tokens/s", "of the limit", "Python, µs")
    return Table("Decoding: median (least – most), and the limit that the memory sets", headings, tuple(rows))


def _decoded(decode: Decode) -> Sequence[str]:
    return (
        f"{decode.batch:,}",
        f"{decode.context:,}",
        spread(decode.tokens_per_second),
        size(decode.step_bytes),
        three(decode.limit),
        f"{100 * decode.share:.0f} %",
        f"{1e6 * decode.python_seconds.median:.0f}",
    )


def memory_table(record: Record) -> Table:
    """Peaks phase by phase."""
    rows = []
    for one in record.bundles:
        for phase in one.walk.phases if one.walk is not None and one.walk.samples else ():
            inside = [s for s in one.walk.samples if phase.began <= s.at <= phase.ended] if one.walk is not None else []
            device = [sample.device for sample in inside if sample.device is not None]
            rows.append(
                (
                    one.card.label,
                    phase.name,
                    seconds(phase.ended - phase.began),
                    size(max(sample.anonymous for sample in inside)) if inside else "too short to see",
                    size(max(sample.mapped for sample in inside)) if inside else "",
                    size(max(device)) if device else "",
                )
            )
    headings = ("", "phase", "took", "anonymous", "mapped files", "GPU")
    on_gpu = any(row[-1] for row in rows)
    cut = len(headings) if on_gpu else -1
    return Table("Peak memory of each phase", headings[:cut], tuple(row[:cut] for row in rows))


def energy_table(record: Record) -> Table:
    """Energy a token, of the bundles of which the machine tells it."""
    rows = tuple(
        (
            one.card.label,
            _joules(one.energy.joules_per_token),
            _joules(one.energy.joules_per_token_over_idle),
            f"{three(one.energy.decode_watts)} W",
            f"{three(one.energy.idle_watts)} W",
            count(one.energy.readings, "reading"),
            one.energy.source,
        )
        for one in record.bundles
        if one.energy is not None
    )
    return Table(
        "Energy of decoding, one question", ("", "a token", "over idle", "decoding", "idle", "of", "meter"), rows
    )

"""What was timed of a report's bundles, in the order and with the names in which it is shown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from llava_deploy.runtime.bench.report import Decode, FirstToken
from llava_deploy.runtime.bench.report import Report as Speed
from llava_deploy.runtime.report.record import Record

_LONGEST = 20
PARTS = {
    "preprocess": "preprocessing",
    "vision": "vision",
    "splice": "splice",
    "prefill": "prefill",
    "rest": "first token",
}
"""Of the first token: fields of :class:`~llava_deploy.runtime.bench.report.FirstToken`, and what people call them."""


@dataclass(frozen=True)
class Timed:
    """A bundle's label as figures have it, and how fast it was."""

    label: str
    speed: Speed

    @property
    def decodes(self) -> tuple[Decode, ...]:
        """Behind each context, and of each batch of several rows."""
        return *self.speed.decode, *(decode for decode in self.speed.batches if decode.batch > 1)


def timed_of(record: Record) -> list[Timed]:
    """The bundles that were timed."""
    return [Timed(figure_label(one.card.label), one.speed) for one in record.bundles if one.speed is not None]


def figure_label(label: str) -> str:
    """A short one that matplotlib takes for text: what begins with ``_`` it would leave out."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in label)
    if len(shown) > _LONGEST:
        shown = f"…{shown[-_LONGEST + 1 :]}"
    return f"\N{ZERO WIDTH SPACE}{shown}" if shown.startswith("_") else shown


def middle_round(first: FirstToken) -> dict[str, float]:
    """Seconds of each of :data:`PARTS` in the round whose total is the median: they add up, medians need not."""
    totals = first.total.each
    middle = totals.index(statistics.median_low(totals))
    return {name: getattr(first, name).each[middle] for name in PARTS}

"""A record as one HTML page that needs nothing else: no script, no font, no address."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llava_deploy.runtime.report import facts, tables
from llava_deploy.runtime.report.figures import Figures, draw
from llava_deploy.runtime.report.palette import style_sheet
from llava_deploy.runtime.report.record import Decision, Record

TEMPLATE = "page.html.jinja"
SHEET = "page.css"
_NO_BREAK = "\N{NO-BREAK SPACE}"
_JOINED = "\N{WORD JOINER}"
"""After a dash a line may end, whatever follows but this."""

_ORDER: tuple[Decision, ...] = ("ship", "do not ship", "not shown")
_SPOKEN: dict[Decision, str] = {"ship": "Ship", "do not ship": "Do not ship", "not shown": "Not shown"}


def render(record: Record) -> str:
    """Text of the page, the same for the same record.

    Raises:
        OptionError: matplotlib is not installed.
    """
    return render_with(record, draw(record))


def render_with(record: Record, figures: Figures) -> str:
    """The page with figures that are drawn already."""
    place = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(place), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tied"] = tied
    return environment.get_template(TEMPLATE).render(
        record=record,
        style=style_sheet() + (place / SHEET).read_text(encoding="utf-8"),
        headline=headline(record),
        spoken=_SPOKEN,
        figures=figures,
        side_by_side=tables.side_by_side(record),
        accuracy=tables.accuracy_table(record),
        first_token=tables.first_token_table(record),
        decode=tables.decode_table(record),
        memory=tables.memory_table(record),
        energy=tables.energy_table(record),
        no_energy=no_energy(record),
        model=facts.model_table(record),
        machine=facts.machine_table(record),
        remarks=facts.remarks(record),
        files=[facts.files_table(one) for one in record.bundles],
        stages=[facts.stages_table(one) for one in record.bundles],
    )


def tied(cell: str) -> str:
    """A cell of numbers, which is parted before its brackets at most: a unit stays with its number."""
    return cell.replace(" ", _NO_BREAK).replace(f"{_NO_BREAK}(", " (").replace("–", f"–{_JOINED}")


def headline(record: Record) -> str:
    """The answer in a line: ``Ship fp32, fp16. Do not ship int4.``"""
    bundles = record.bundles
    if len(bundles) == 1:
        return f"{_SPOKEN[bundles[0].verdict.decision]}."
    said = []
    for decision in _ORDER:
        labels = ", ".join(one.card.label for one in bundles if one.verdict.decision == decision)
        if labels:
            said.append(f"{_SPOKEN[decision]}{': ' if decision == 'not shown' else ' '}{labels}.")
    return " ".join(said)


def no_energy(record: Record) -> list[str]:
    """Of each bundle without energy why, a sentence each; one for all where it is the same."""
    said = {
        one.card.label: f"not told by this machine: {'; '.join(one.energy_refusals)}"
        for one in record.bundles
        if one.energy is None and one.walk is not None
    }
    if len({*said.values()}) == 1 and not any(one.energy for one in record.bundles):
        return [f"Energy is {next(iter(said.values()))}."]
    return [f"{label}: {reason}." for label, reason in said.items()]

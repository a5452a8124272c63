"""The page: whole, valid, safe, alone, and the same for the same record."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from llava_deploy.engines.errors import OptionError
from llava_deploy.runtime.report.page import headline, render
from llava_deploy.runtime.report.palette import COLOURS
from llava_deploy.runtime.report.record import Record
from llava_deploy.runtime.report.tables import side_by_side

VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use", "rect"}
SECTIONS = ("verdict", "side-by-side", "speed", "memory", "energy", "self-test", "bundles", "machine")


class Strict(HTMLParser):
    """Elements closed as they were opened; ids, what refers to them, and texts, collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.referred: set[str] = set()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.columns: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag}: an attribute stands twice"
        values = dict(attrs)
        self.tags.append((tag, values))
        self.ids += [value for name, value in attrs if name == "id" and value]
        for name, value in attrs:
            text = value or ""
            self.referred |= {*re.findall(r"url\(#([^)]+)\)", text)}
            self.referred |= {*text.split()} if name in ("aria-labelledby", "aria-describedby") else set()
            self.referred |= {text[1:]} if name == "href" else set()
        if tag == "tr":
            self.columns.append(0)
        if tag in ("td", "th"):
            self.columns[-1] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID or "svg" in self.open, f"<{tag}/> closes nothing in HTML"
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID and (not self.open or self.open[-1] != tag):
            return
        assert self.open, f"</{tag}> of nothing"
        assert self.open.pop() == tag, f"</{tag}> does not close {self.open}"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(page: str) -> Strict:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def page(record: Record) -> str:
    return render(record)


def test_it_is_valid(page: str) -> None:
    found = parsed(page)
    assert page.startswith("<!DOCTYPE html>\n")
    assert ("html", {"lang": "en"}) in found.tags
    assert len({*found.ids}) == len(found.ids)
    assert found.referred <= {*found.ids}
    tags = [tag for tag, _ in found.tags]
    assert tags.count("h1") == tags.count("main") == tags.count("title") - tags.count("figure") == 1


def test_every_section_is_there_with_all_figures(page: str) -> None:
    found = parsed(page)
    assert tuple(attrs["id"] for tag, attrs in found.tags if tag == "section") == SECTIONS
    figures = [attrs for tag, attrs in found.tags if tag == "svg" and attrs.get("role") == "img"]
    assert [str(attrs["aria-labelledby"]).split()[0] for attrs in figures] == [
        f"{name}-title" for name in ("first-token", "contexts", "batches", "roof", "memory")
    ]
    assert page.count("<desc ") == page.count("<figcaption>") == len(figures)


def test_tables_have_headings_and_even_rows(page: str) -> None:
    tables = re.findall(r"<table.*?</table>", page, re.DOTALL)
    assert len(tables) >= 10
    for table in tables:
        assert "<caption>" in table
        assert len({*parsed(table).columns}) == 1, table
        assert table.count('<th scope="row">') == table.count("<tr>") - 1


def test_it_asks_for_nothing_else(page: str) -> None:
    assert "://" not in page
    assert not re.search(r"@import|@font-face|url\((?!#)|<script|<link|<img|<iframe|\bsrc=", page)
    assert not re.search(r"\son[a-z]+=", page)
    assert len(page.encode()) < 500_000


def test_it_follows_light_and_dark(page: str) -> None:
    style, _, body = page.partition("</style>")
    assert "@media screen and (prefers-color-scheme: dark)" in style
    for colour in COLOURS:
        assert style.count(f"--{colour.name}: ") == 2
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?=[;\"])", body), "a colour that follows nothing"
    assert {*re.findall(r"var\(--([a-z0-9-]+)\)", page)} <= {colour.name for colour in COLOURS} | {"mark"}
    assert "font-family" not in body


def test_the_same_record_gives_the_same_page(page: str, record: Record) -> None:
    assert render(record) == page


def test_what_is_in_a_bundle_is_text(record: Record) -> None:
    evil = '<script>alert("1")</script>"\'&<b>'
    first, *rest = record.bundles
    model = replace(first.card.model, name=evil, decoder=evil)
    card = replace(first.card, label=evil, directory=evil, model=model, tools={evil: evil})
    bundles = (replace(first, card=card), *rest)
    page = render(replace(record, title=evil, bundles=bundles))
    assert "<script" not in page
    assert "<b>'" not in page
    found = parsed(page)
    assert any(evil in text for text in found.texts)
    assert len([tag for tag, _ in found.tags if tag == "table"]) == len(
        [tag for tag, _ in parsed(render(record)).tags if tag == "table"]
    )


def test_the_verdict_comes_first_with_its_reasons(failed: Record) -> None:
    page = render(failed)
    parsed(page)
    assert "<h1>Ship fp32. Do not ship fp16, int4.</h1>" in page
    assert page.index("<h1>") < page.index('id="verdict"') < page.index('id="side-by-side"')
    verdict = page[page.index('id="verdict"') : page.index('id="side-by-side"')]
    assert "logits of one-picture is the first stage out of tolerance" in verdict
    assert "killed while it was loaded" in verdict
    assert "not\N{NO-BREAK SPACE}measured" in page
    assert "A look (--quick)" in page
    energy = next(row for row in side_by_side(failed).rows if row[0] == "energy a token")
    assert energy == ("energy a token", "500 mJ", "not told", "not measured")
    assert "<details open>" in page  # the stages of the one that failed


def test_energy_that_nothing_tells_is_said(record: Record) -> None:
    page = render(replace(record, bundles=record.bundles[1:]))
    assert "Energy is not told by this machine: only root may read the counters." in page
    mixed = render(record)
    assert "500\N{NO-BREAK SPACE}mJ" in mixed
    assert "fp16: not told by this machine: only root may read the counters." in mixed


@pytest.mark.parametrize("count", [1, 2, 3])
def test_headlines(count: int, record: Record, failed: Record) -> None:
    said = {1: "Ship.", 2: "Ship fp32, fp16.", 3: "Ship fp32, fp16, int4."}
    assert headline(replace(record, bundles=record.bundles[:count])) == said[count]
    assert headline(replace(failed, bundles=failed.bundles[2:])) == "Do not ship."


def test_one_bundle_without_batches_or_memory(record: Record) -> None:
    first = record.bundles[0]
    assert first.speed is not None
    assert first.walk is not None
    alone = replace(
        first,
        speed=replace(first.speed, batches=(), decode=first.speed.decode[:1]),
        walk=replace(first.walk, samples=()),
    )
    page = render(replace(record, bundles=(alone,)))
    parsed(page)
    assert "This system does not tell what a process takes." in page
    assert "against the first" not in page.replace("× is against the first", "")


def test_more_bundles_than_colours_and_strange_names(record: Record) -> None:
    first = record.bundles[0]
    names = ["$x^$", "_hidden", "a/very/long/path/to/" + "x" * 300, "bell \a", "half \udcff", "%s {}", "\\frac"]
    many = [replace(first, card=replace(first.card, label=name)) for name in names]
    page = render(replace(record, bundles=tuple(many)))
    parsed(page)
    memory = page[page.index('aria-labelledby="memory-title') :]
    assert re.findall(r"<text[^>]*>([^<]*hidden|\$x\^\$)</text>", memory) == ["$x^$", "\N{ZERO WIDTH SPACE}_hidden"]


def test_without_matplotlib_the_extra_is_named(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"pip install 'llava-deploy\[bench\]'"):
        render(record)

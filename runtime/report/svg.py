"""A figure of matplotlib as SVG that stands in a page: its colours are the page's variables, its font the page's."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from llava_deploy.runtime.report.palette import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SALT = "llava-deploy"
_VARIABLES = {colour.stand_in: colour.variable for colour in COLOURS}
_ADDRESS = re.compile(r"url\(#([^)]+)\)")
_DROPPED = ("metadata", "style")
"""matplotlib's style is for ``*``: for the whole page. The page's sheet says the same of figures alone."""

_DECIMALS = 2


def inline_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Text of an ``svg`` element, the same for the same figure.

    Args:
        figure: drawn in the palette's stand-ins.
        name: that no other figure of the page has; its ids begin with it.
        title: what is shown, for those who do not see it.
        description: what it says.
    """
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": _SALT}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(drawn.getvalue())
    _without_namespaces(root)
    _renamed(root, name)
    for element in root.iter():
        _restyle(element)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib = {
        "viewBox": f"0 0 {float(width):g} {float(height):g}",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-description",
        "class": "figure",
    }
    for at, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        element.text = text
        root.insert(at, element)
    return ElementTree.tostring(root, encoding="unicode")


def _without_namespaces(root: ElementTree.Element) -> None:
    """As HTML has it, which knows its own two by name."""
    for parent in root.iter():
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.rpartition("}")[2] in _DROPPED:
                parent.remove(child)
        parent.attrib = {key.rpartition("}")[2]: value for key, value in parent.attrib.items()}
        parent.text, parent.tail = _trimmed(parent.text), _trimmed(parent.tail)


def _trimmed(text: str | None) -> str | None:
    return None if text is None or not text.strip() else text


def _renamed(root: ElementTree.Element, name: str) -> None:
    """Ids that are used get names of this figure, the others go: they are the same in every figure."""
    used = {address.removeprefix("#") for address in _addresses(root)}
    new = {old: f"{name}-{number}" for number, old in enumerate(sorted(used))}
    for element in root.iter():
        old = element.attrib.pop("id", None)
        if old in new:
            element.attrib["id"] = new[old]
        for key, value in element.attrib.items():
            if key == "href":
                element.attrib[key] = f"#{new[value.removeprefix('#')]}"
            else:
                element.attrib[key] = _ADDRESS.sub(lambda found: f"url(#{new[found[1]]})", value)


def _addresses(root: ElementTree.Element) -> Iterator[str]:
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "href":
                yield value
            yield from _ADDRESS.findall(value)


def _restyle(element: ElementTree.Element) -> None:
    """The page's colours and font; two digits behind the point are enough of a position."""
    for key, value in element.attrib.items():
        for stand_in, variable in _VARIABLES.items():
            value = value.replace(stand_in, variable)  # noqa: PLW2901
        if key == "style":
            value = re.sub(r"font: (?:([0-9]+) )?([0-9.]+)px [^;]*", _font, value)  # noqa: PLW2901
            value = re.sub(r"font-family: [^;]*;? ?", "", value)  # noqa: PLW2901
        elif key in ("d", "x", "y", "transform", "points"):
            value = re.sub(r"-?\d+\.\d{3,}", _rounded, value)  # noqa: PLW2901
        element.attrib[key] = value


def _font(found: re.Match[str]) -> str:
    weight = "" if found[1] is None else f"; font-weight: {found[1]}"
    return f"font-size: {found[2]}px{weight}"


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.{_DECIMALS}f}".rstrip("0").rstrip(".")

"""Colours of the page and its figures, light and dark.

A figure is drawn once, in stand-ins, and its colours are variables of the page's style sheet, so that it follows what
the reader prefers. Lines and bars have a contrast of 3:1 or more on both grounds, text one of 4.5:1, and neighbours
stay apart for people who do not tell red from green, or blue from yellow; the tests compute all of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """One role, by the name of its variable, and its values on a light and on a dark ground."""

    name: str
    light: str
    dark: str
    stand_in: str
    """What figures are drawn in; no other role has it."""

    @property
    def variable(self) -> str:
        """As a value of a property."""
        return f"var(--{self.name})"


GROUND = Colour("ground", "#ffffff", "#14181d", "#010101")
INK = Colour("ink", "#1b1f24", "#e8ebef", "#010102")
FAINT = Colour("faint", "#586069", "#a3adb8", "#010103")
RULE = Colour("rule", "#d5d9de", "#363d46", "#010104")
PANEL = Colour("panel", "#f5f6f8", "#1c2128", "#010105")
SERIES = (
    Colour("series-1", "#1746b8", "#6fb0f2", "#020201"),
    Colour("series-2", "#b5340b", "#e0703c", "#020202"),
    Colour("series-3", "#0f9b7a", "#66e6bd", "#020203"),
    Colour("series-4", "#5b1a73", "#a352e6", "#020204"),
    Colour("series-5", "#a88600", "#ece35a", "#020205"),
)
GOOD = Colour("good", "#116329", "#57d980", "#030301")
BAD = Colour("bad", "#b3261e", "#ff8a80", "#030302")
OPEN = Colour("open", "#7a4d00", "#e8b04b", "#030303")

COLOURS = (GROUND, INK, FAINT, RULE, PANEL, *SERIES, GOOD, BAD, OPEN)


def style_sheet() -> str:
    """The variables, for both grounds; printed pages are light."""
    light, dark = (
        " ".join(f"--{colour.name}: {getattr(colour, ground)};" for colour in COLOURS) for ground in ("light", "dark")
    )
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )

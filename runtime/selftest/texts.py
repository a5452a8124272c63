"""Where two texts, or two rows of tokens, part: a few of either around it, for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

_AROUND = 12


def text_difference(found: str, wanted: str) -> str | None:
    """``character 17: 'R: <image>Which' instead of 'R: <image> Which'``; ``None`` where they are equal."""
    at = _first(found, wanted)
    if at is None:
        return None
    cut = slice(max(0, at - _AROUND), at + _AROUND)
    return f"character {at}: {found[cut]!r} instead of {wanted[cut]!r}"


def token_difference(found: Sequence[int], wanted: Sequence[int]) -> str | None:
    """``token 5 of 41: 12, 9 instead of 12, 8``; ``None`` where they are equal."""
    at = _first(found, wanted)
    if at is None:
        return None
    cut = slice(max(0, at - 2), at + 3)
    shown = (", ".join(map(str, row[cut])) or "nothing" for row in (found, wanted))
    return f"token {at} of {len(wanted)}: {' instead of '.join(shown)}"


def _first(found: Sequence[object], wanted: Sequence[object]) -> int | None:
    pairs = enumerate(zip_longest(found, wanted))  # neither a character nor a token is None
    return next((at for at, (one, other) in pairs if one != other), None)

"""Text on its way to a terminal: names in manifests, archives and paths are written by others."""

from __future__ import annotations

import codecs
import re
import shlex
from pathlib import Path

ESCAPES = "llava-deploy.escapes"
"""Name of an error handler for streams: what an encoding has not, as ``\\uXXXX``, which JSON has too."""

# C0 without tab and newline, DEL, C1 (U+009B begins a sequence as ESC [ does), and what turns the direction of text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """``text`` with U+FFFD for every character that could command a terminal; tabs and newlines stay."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def printable_json(text: str) -> str:
    """A JSON text without such characters, and of the same value."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def as_argument(path: Path) -> str:
    """``path`` as one types it in a shell, also where it begins with a dash."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    escaped = (f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
    return "".join(escaped), error.end


def register_escapes() -> None:
    """Have streams know :data:`ESCAPES`."""
    codecs.register_error(ESCAPES, _escape)

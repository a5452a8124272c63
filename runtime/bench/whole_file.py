"""A result's file that is whole or not there; what had the name before stays until then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a hidden sibling of ``path`` to write, and rename it to ``path`` when the block ends without an error.

    On an error, Ctrl-C included, the sibling is removed. A pipe or a device is given as it is.

    Raises:
        OSError: it cannot be written or renamed.
    """
    place = path.resolve()  # through a link, not in its place
    if place.exists() and not place.is_file():
        yield path
        return
    partial = place.with_name(f".{place.name}.partial")
    try:
        yield partial
        partial.replace(place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise

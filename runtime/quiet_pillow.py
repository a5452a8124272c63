"""Keeping what Pillow and libtiff say of a damaged picture off standard error, in programs of several threads too.

Pillow warns through Python's ``warnings`` and logs errors; libtiff, inside Pillow, prints by itself. These switches are
of the whole process: whoever comes first turns them, and the last to leave turns them back, so that pictures in other
threads neither wait for each other nor find the switches as somebody else had them for a moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import warnings
from collections.abc import Iterator

_HANDLER = "TIFFSetErrorHandler"  # libtiff's; it gives back the handler that was there
_LOGGER = "PIL.TiffImagePlugin"  # the only one of Pillow's that logs more than what it does


class _Switches:
    """How many are inside, and what puts things back when the last one leaves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._undo.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._undo.enter_context(_silent_log())
                self._undo.enter_context(_silent_libtiff())
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()


_switches = _Switches()


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings and libtiff's messages in: what matters of them is an error here."""
    _switches.enter()
    try:
        yield
    finally:
        _switches.leave()


@contextlib.contextmanager
def _silent_log() -> Iterator[None]:
    """Without a configuration, Python's ``logging`` writes errors to standard error."""
    logger = logging.getLogger(_LOGGER)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _silent_libtiff() -> Iterator[None]:
    """No handler for libtiff's errors, which Pillow turns into exceptions; nothing where Pillow has no libtiff."""
    from PIL import _imaging

    try:
        set_handler = getattr(ctypes.CDLL(_imaging.__file__), _HANDLER)
    except (OSError, AttributeError):
        yield
        return
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    before = set_handler(None)
    try:
        yield
    finally:
        set_handler(before)

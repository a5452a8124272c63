"""Pillow's and libtiff's messages are kept in, others' are not, and everything is as it was afterwards."""

from __future__ import annotations

import ctypes
import io
import logging
import threading
import warnings

import pytest
from PIL import Image

from llava_deploy.runtime.quiet_pillow import quiet_pillow


def libtiff_handler() -> int | None:
    """Address of libtiff's error handler."""
    switch = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
    switch.argtypes, switch.restype = [ctypes.c_void_p], ctypes.c_void_p
    handler = switch(None)
    switch(handler)
    return handler


def broken_tiff() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "TIFF", compression="tiff_adobe_deflate")
    data = bytearray(buffer.getvalue())
    data[8:12] = bytes(4)
    return bytes(data)


def load(data: bytes) -> None:
    with pytest.raises(OSError, match="decoder error"), Image.open(io.BytesIO(data)) as image:
        image.load()


def test_libtiff_prints_and_is_silent_within(capfd: pytest.CaptureFixture[str]) -> None:
    load(broken_tiff())
    assert "ZIPDecode" in capfd.readouterr().err
    with quiet_pillow():
        load(broken_tiff())
    assert capfd.readouterr() == ("", "")


def test_only_pillows_warnings_are_kept_in() -> None:
    exif = Image.Exif()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with quiet_pillow():
            exif.load(b"Exif\0\0MM\0*\xff\xff\xff\xff")
            warnings.warn("somebody else's", UserWarning, stacklevel=1)
        Image.Exif().load(b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert [str(warning.message).partition(" ")[0] for warning in said] == ["somebody", "Corrupt"]


def test_the_last_to_leave_puts_everything_back() -> None:
    def state() -> tuple[object, ...]:
        return warnings.filters[:], logging.getLogger("PIL.TiffImagePlugin").disabled, libtiff_handler()

    before = state()
    inside, leave = threading.Barrier(2), threading.Event()

    def other() -> None:
        with quiet_pillow():
            inside.wait()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with quiet_pillow():
        inside.wait()
    assert state()[1:] == (True, None)  # the other one is inside still
    leave.set()
    thread.join()
    assert state() == before
    with pytest.raises(ValueError, match="x"), quiet_pillow():
        raise ValueError("x")
    assert state() == before

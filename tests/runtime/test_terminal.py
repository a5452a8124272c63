"""What people get to see."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from rich.console import Console

from llava_deploy.runtime.terminal import THUMBNAIL_COLUMNS, progress, seconds, shows_pictures, size, thumbnail


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (14_700_000, "14.7 MB"), (7e12, "7.0 TB")]
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123, "12 ms"), (1.26, "1.3 s"), (119.4, "119.4 s"), (252.3, "4 min 12 s")]
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_thumbnail_shows_two_pixels_a_character() -> None:
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 32, 64, 64))
    lines = thumbnail(picture)
    assert [len(line) for line in lines] == [THUMBNAIL_COLUMNS] * (THUMBNAIL_COLUMNS // 2)
    assert "#ff0000 on #ff0000" in str(lines[0].spans[0].style)
    assert "#0000ff on #0000ff" in str(lines[-1].spans[0].style)


def test_pictures_are_for_terminals_with_colours() -> None:
    assert shows_pictures(Console(file=io.StringIO(), force_terminal=True, color_system="truecolor"))
    assert not shows_pictures(Console(file=io.StringIO(), force_terminal=True, color_system="standard"))
    assert not shows_pictures(Console(file=io.StringIO()))


def test_progress_is_silent_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("counting", quiet=False) as step:
        step(1, 2)
    assert capfd.readouterr() == ("", "")

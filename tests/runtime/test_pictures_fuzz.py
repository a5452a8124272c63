"""Thousands of broken pictures: each is refused in one line, or comes out whole and within the limits, at once."""

from __future__ import annotations

import base64
import random
import subprocess
import sys
import time
import urllib.parse
import warnings
from pathlib import Path

import broken_pictures
import pytest
from broken_pictures import SEEDS, mutants

from llava_deploy.engines.errors import PictureError
from llava_deploy.runtime import pixels
from llava_deploy.runtime.pictures import load_picture
from llava_deploy.runtime.pixels import MAX_PIXELS

PATIENCE = 5.0
"""Seconds for one input; the slowest takes a tenth of it on a busy machine."""


def data_uri(draw: random.Random, data: bytes) -> str:
    """The bytes as a data URI, some of whose characters are none of base64."""
    if draw.random() < 0.3:
        return "data:image/png," + urllib.parse.quote_from_bytes(data)
    text = base64.b64encode(data).decode()
    if draw.random() < 0.5:
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(("=", "é", "%", "%zz", "\ud800", "\0", "-", " ")) + text[at:]
    return "data:;base64," + text


def take(source: bytes | str | Path) -> bool:
    """Load it; whether it came out."""
    began, refusal = time.perf_counter(), None
    try:
        image = load_picture(source)
    except PictureError as error:
        refusal = str(error)
    finally:
        assert time.perf_counter() - began < PATIENCE
    if refusal is not None:
        assert "\n" not in refusal
        return False
    assert image.mode == "RGB"
    assert 1 <= image.width * image.height <= MAX_PIXELS
    return True


@pytest.mark.parametrize("name", SEEDS)
def test_mutants_are_refused_or_whole_and_nothing_is_said(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert take(SEEDS[name])
    monkeypatch.chdir(tmp_path)
    draw, path, taken = random.Random(1), tmp_path / "picture", 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number, mutant in enumerate(mutants(name)):
            taken += take(mutant)
            if number % 8 == 0:
                take(data_uri(draw, mutant))
            if number % 16 == 0:
                path.write_bytes(mutant)
                assert take(path) == take(mutant)
                path.unlink()
    assert [str(warning.message) for warning in said] == []
    assert capfd.readouterr() == ("", "")
    assert 0 < taken < len(mutants(name))
    assert list(tmp_path.iterdir()) == []


def test_there_are_ten_thousand_of_them_and_they_differ() -> None:
    made = [mutant for name in SEEDS for mutant in mutants(name)]
    assert len(made) >= len({*made}) >= 10_000


IN_LITTLE_ROOM = """
import resource, sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from broken_pictures import SEEDS, bombs, mutants

from llava_deploy.engines.errors import PictureError
from llava_deploy.runtime.pictures import load_picture

for data in SEEDS.values():  # every decoder is loaded now
    load_picture(data)
made = bombs()
names = ("tiff deflate", "jpeg2000", "webp animated", "png chunks")
made_mutants = [mutant for name in names for mutant in mutants(name)[:100]]

def watch(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and not {*arguments[1]} <= {*"rb"}:
        raise SystemExit(f"wrote: {arguments}")
    if event.startswith(("os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink", "subprocess", "socket")):
        raise SystemExit(f"did: {event} {arguments}")

sys.addaudithook(watch)
pages = int(Path("/proc/self/statm").read_text().split()[0])
room = pages * resource.getpagesize() + (192 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for name, data in made.items():
    began, said = time.perf_counter(), "whole"
    try:
        load_picture(data)
    except PictureError as error:
        said = str(error)
    assert time.perf_counter() - began < 5, name
    assert name.partition(":")[0] in said or not name.startswith("too large"), (name, said)
for data in made_mutants:
    try:
        load_picture(data)
    except PictureError:
        pass
print("all refused")
"""


def test_bombs_are_refused_in_little_room_and_nothing_is_written(child_environment: dict[str, str]) -> None:
    run = [sys.executable, "-c", IN_LITTLE_ROOM, str(Path(broken_pictures.__file__).parent)]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=120, env=child_environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all refused\n", "")


def test_the_bands_of_a_large_picture_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [name for name in SEEDS if "animated" not in name]
    whole = [load_picture(SEEDS[name]).tobytes() for name in kinds]
    monkeypatch.setattr(pixels, "_BAND", 70)
    assert [load_picture(SEEDS[name]).tobytes() for name in kinds] == whole

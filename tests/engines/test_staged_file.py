from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava_deploy.engines.errors import InputError
from llava_deploy.engines.staging import require_free_name, staged_directory, staged_file


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "model.lvd"


def make(output: Path, text: str, *, replace: bool = False) -> None:
    with staged_file(output, replace=replace) as place:
        place.write_text(text)


def test_the_file_appears_when_it_is_whole(output: Path) -> None:
    with staged_file(output, replace=False) as place:
        place.write_text("text")
        assert not output.exists()
    assert output.read_text() == "text"
    assert [*output.parent.iterdir()] == [output]


def test_an_error_leaves_what_was_there(output: Path) -> None:
    for wanted in ([], [output]):
        with pytest.raises(KeyboardInterrupt), staged_file(output, replace=True) as place:
            place.write_text("half")
            raise KeyboardInterrupt
        assert [*output.parent.iterdir()] == wanted
        make(output, "old", replace=True)
    assert output.read_text() == "old"


def test_what_another_process_wrote_in_the_meantime_stays(output: Path) -> None:
    with pytest.raises(FileExistsError), staged_file(output, replace=False) as place:
        place.write_text("ours")
        output.write_text("theirs")
    assert output.read_text() == "theirs"
    assert [*output.parent.iterdir()] == [output]


def test_its_mode_is_that_of_any_new_file(output: Path) -> None:
    before = os.umask(0o027)
    try:
        make(output, "text")
    finally:
        os.umask(before)
    assert output.stat().st_mode & 0o777 == 0o640


def test_what_a_killed_process_left_goes_with_the_next_call(output: Path) -> None:
    script = f"""
import os, pathlib, signal
from llava_deploy.engines.staging import staged_file
with staged_file(pathlib.Path({str(output)!r}), replace=True) as place:
    place.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert not output.exists()
    assert [*output.parent.iterdir()]
    make(output, "new")
    assert [*output.parent.iterdir()] == [output]


def test_at_work_on_the_same_name_at_once(output: Path) -> None:
    with staged_file(output, replace=True) as place:
        place.write_text("first")
        make(output, "second")
        assert place.read_text() == "first"
    assert output.read_text() == "first"


def test_only_bundles_are_replaced(tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    require_free_name(place, replace=False)
    with staged_directory(place, replace=False) as directory:
        (directory / "thesis.doc").write_text("years")
    with pytest.raises(InputError, match="exists and is not a bundle"):
        require_free_name(place, replace=True)
    (place / "manifest.json").write_text("{}")
    require_free_name(place, replace=True)
    with pytest.raises(InputError, match="exists already"):
        require_free_name(place, replace=False)

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_deploy.engines import staging
from llava_deploy.engines.staging import staged_directory

_REPLACING = """
import pathlib, sys
from llava_deploy.engines.staging import staged_directory
print(flush=True)
for i in range(100):
    with staged_directory(pathlib.Path(sys.argv[1]), replace=True) as directory:
        for name in ("file", "other"):
            (directory / name).write_text(str(i))
"""


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that begins, as the block does, to replace ``output`` a hundred times."""
    with subprocess.Popen([sys.executable, "-c", _REPLACING, output], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def exchange_says(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system refuse to exchange two names."""

    class Library:
        def renameat2(self, *_: object) -> int:
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *_, **__: Library())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "bundle"


def names(output: Path) -> list[str]:
    """Everything beside the output, hidden or not."""
    return sorted(path.name for path in output.parent.iterdir())


def make(output: Path, text: str, *, replace: bool = False) -> None:
    with staged_directory(output, replace=replace) as directory:
        for name in ("file", "other"):
            (directory / name).write_text(text)


def killed(output: Path, where: str) -> None:
    """Stage a replacement in a process of its own, which kills itself with SIGKILL at the line ``where``."""
    script = f"""
import os, pathlib, signal
from llava_deploy.engines import staging
from llava_deploy.engines.staging import staged_directory
output = pathlib.Path({str(output)!r})
rename, count = pathlib.Path.rename, 0
def die(): os.kill(os.getpid(), signal.SIGKILL)
def counted(self, target):
    global count
    count += 1
    if count == 2: die()
    return rename(self, target)
with staged_directory(output, replace=True) as directory:
    (directory / "file").write_text("new")
    {where}
"""
    result = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == -signal.SIGKILL, result.stderr


def test_the_directory_appears_when_it_is_whole(output: Path) -> None:
    with staged_directory(output, replace=False) as directory:
        (directory / "file").write_text("text")
        assert not output.exists()
        assert directory.stat().st_dev == output.parent.stat().st_dev  # one rename, on one file system
    assert (output / "file").read_text() == "text"
    assert names(output) == ["bundle"]


def test_its_mode_is_that_of_any_new_directory(output: Path) -> None:
    before = os.umask(0o027)
    try:
        make(output, "text")
    finally:
        os.umask(before)
    assert output.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("x")])
def test_an_error_leaves_nothing(output: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staged_directory(output, replace=False) as directory:
        (directory / "file").write_text("half")
        raise error
    assert names(output) == []


@pytest.mark.parametrize("replace", [False, True])
def test_an_error_leaves_the_old_one_as_it_was(output: Path, replace: bool) -> None:
    make(output, "old")
    with pytest.raises(ValueError, match="x"), staged_directory(output, replace=replace) as directory:
        (directory / "file").write_text("half")
        raise ValueError("x")
    assert (output / "file").read_text() == "old"
    assert names(output) == ["bundle"]


def test_an_old_one_is_replaced_only_where_that_is_asked_for(output: Path) -> None:
    make(output, "old")
    with pytest.raises(OSError, match="not empty"):
        make(output, "new")
    assert (output / "file").read_text() == "old"
    make(output, "new", replace=True)
    assert (output / "file").read_text() == "new"
    assert names(output) == ["bundle"]


def test_the_name_is_never_gone(output: Path) -> None:
    """Seen from outside, while one directory after another takes its place."""
    make(output, "0")
    with replacing(output) as process:
        seen = set()
        while process.poll() is None:
            seen.add(output.stat().st_mtime_ns)
        assert process.wait() == 0
    assert len(seen) > 10  # it did see them change
    assert names(output) == ["bundle"]


def test_a_process_killed_at_any_moment_leaves_one_of_them_under_its_name(output: Path) -> None:
    draw = random.Random(6)
    make(output, "0")
    for _ in range(12):
        with replacing(output) as process:
            time.sleep(draw.uniform(0.005, 0.05))
            process.kill()
        assert int((output / "file").read_text()) >= 0
        assert (output / "file").read_text() == (output / "other").read_text()
    make(output, "last", replace=True)
    assert names(output) == ["bundle"]


def test_names_change_in_one_step_where_the_system_can(output: Path) -> None:
    """Without it every test of the step would pass by way of the two renames."""
    make(output, "one")
    other = output.with_name("other")
    make(other, "two")
    assert staging._exchange(output, other)
    assert [(path / "file").read_text() for path in (output, other)] == ["two", "one"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_without_that_step_there_are_two_renames(output: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make(output, "old")
    exchange_says(code, monkeypatch)
    make(output, "new", replace=True)
    assert (output / "file").read_text() == "new"
    assert names(output) == ["bundle"]


def test_a_c_library_without_that_step(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(output, "old")
    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *_, **__: object())
    make(output, "new", replace=True)
    assert (output / "file").read_text() == "new"


def test_an_error_of_that_step_leaves_the_old_one(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(output, "old")
    exchange_says(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match=r"Input/output error.*bundle"):
        make(output, "new", replace=True)
    assert (output / "file").read_text() == "old"
    assert names(output) == ["bundle"]


def test_the_old_one_comes_back_when_the_second_rename_fails(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(output, "old")
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    rename, targets = Path.rename, []

    def fails_once(self: Path, target: Path) -> Path:
        targets.append(target)
        if len(targets) == 2:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(staging.Path, "rename", fails_once)
    with pytest.raises(OSError, match="broken disk"):
        make(output, "new", replace=True)
    monkeypatch.undo()
    assert (output / "file").read_text() == "old"
    assert names(output) == ["bundle"]


def test_a_killed_process_leaves_nothing_by_that_name(output: Path) -> None:
    killed(output, "die()")
    assert not output.exists()
    (left,) = names(output)
    assert left.startswith(".bundle.partial-")
    make(output, "next")
    assert names(output) == ["bundle"]
    assert (output / "file").read_text() == "next"


def test_a_process_killed_between_the_two_renames_loses_nothing(output: Path) -> None:
    make(output, "old")
    killed(output, "pathlib.Path.rename, staging._exchange = counted, lambda *_: False")
    assert not output.exists()
    with pytest.raises(ValueError, match="x"), staged_directory(output, replace=True):
        assert (output / "file").read_text() == "old"  # put back before anything else
        raise ValueError("x")
    assert (output / "file").read_text() == "old"
    assert names(output) == ["bundle"]


def test_what_a_living_process_is_writing_is_left_alone(output: Path) -> None:
    with staged_directory(output, replace=True) as first:
        (first / "file").write_text("first")
        make(output, "second", replace=True)
        assert first.exists()
    assert (output / "file").read_text() == "first"


@pytest.mark.parametrize("name", [".bundle.partial-", ".bundle.partial-me-1", ".bundle2.partial-999999999-x", "other"])
def test_what_is_not_ours_is_left_alone(output: Path, name: str) -> None:
    (output.parent / name).mkdir(parents=True)
    make(output, "text")
    assert names(output) == sorted([name, "bundle"])

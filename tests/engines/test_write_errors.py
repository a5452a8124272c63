"""Disks that are full, read-only or without locks, and two processes that write one directory."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from llava_deploy.engines import onnxruntime_builder
from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.engines.onnxruntime_builder import build_onnxruntime
from llava_deploy.engines.staging import staged_directory, write_error


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems may have none; what is staged there is whole or not at all too, and never swept."""

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with staged_directory(tmp_path / "bundle", replace=False) as staging:
        (staging / "file").write_text("text")
        with staged_directory(tmp_path / "bundle", replace=False):
            pass
        (tmp_path / "bundle").rmdir()
    assert (tmp_path / "bundle" / "file").read_text() == "text"


def test_killed_before_there_was_a_lock(tmp_path: Path) -> None:
    tempfile.mkdtemp(prefix=".bundle.partial-", dir=tmp_path)
    (tmp_path / ".bundle.partial-somebody").mkdir()
    (tmp_path / ".bundle.partial-somebody" / "file").write_text("somebody's")
    with staged_directory(tmp_path / "bundle", replace=False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle.partial-somebody", "bundle"]


def test_no_lock_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, not one directory after another."""
    opened = os.open

    def full(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT and str(path).endswith("lock"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return opened(path, flags, mode)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "open", full)
    with (
        pytest.raises(OSError, match="Disk quota exceeded"),
        staged_directory(tmp_path / "bundle", replace=False),
    ):
        pass


def test_what_is_told_of_system_errors(tmp_path: Path) -> None:
    full = write_error(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    assert "the disk is full, nothing was written; free some space" in str(full)
    taken = write_error(tmp_path, OSError(errno.ENOTEMPTY, "Directory not empty", "a", None, "b"))
    assert "another process wrote it in the meantime" in str(taken)
    other = write_error(tmp_path, OSError(errno.EROFS, "Read-only file system", "/x/.bundle.partial-1"))
    assert "not written (Read-only file system at /x/.bundle.partial-1); choose another directory" in str(other)
    assert isinstance(other, LlavaDeployError)


def test_a_bundle_on_a_read_only_disk(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle, ignore=shutil.ignore_patterns("engines"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(bundle))

    monkeypatch.setattr(onnxruntime_builder, "staged_directory", refuse)
    with pytest.raises(LlavaDeployError, match=r"not written .Read-only file system at"):
        build_onnxruntime(bundle)


def test_no_room_for_an_engine(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_bundle, bundle, ignore=shutil.ignore_patterns("engines"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(LlavaDeployError, match=r"the disk is full: the engine wants .* bytes, 1,000 are free"):
        build_onnxruntime(bundle)
    assert not (bundle / "engines").exists()

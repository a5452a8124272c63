"""Files that are hashed while they are written."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from llava_deploy.engines.manifest import describe_file
from llava_deploy.exporter.hashed_file import hashed_file


def test_the_entry_is_the_one_of_the_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((300, 5000)).astype(np.float32)
    with hashed_file(tmp_path / "data") as file:
        sizes = []
        for part in (b"", b"head", values, values[:0], np.float16([[1.5], [2.0]]), b"tail"):
            file.write(part)
            sizes.append(file.tell())
    content = b"head" + values.tobytes() + np.float16([1.5, 2.0]).tobytes() + b"tail"
    assert (tmp_path / "data").read_bytes() == content
    assert sizes == [0, 4, 4 + values.nbytes, 4 + values.nbytes, 8 + values.nbytes, len(content)]
    assert file.entry == describe_file(tmp_path, "data")


def test_a_file_without_a_byte(tmp_path: Path) -> None:
    with hashed_file(tmp_path / "data") as file:
        pass
    assert file.entry.sha256 == hashlib.sha256().hexdigest()


def test_writes_that_the_system_cuts_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hashed_file(tmp_path / "data") as file:
        raw = file._file

        class Short:
            def fileno(self) -> int:
                return raw.fileno()

            def write(self, data: memoryview) -> int:
                return raw.write(data[:3])

        monkeypatch.setattr(file, "_file", Short())
        file.write(b"more than three")
    assert (tmp_path / "data").read_bytes() == b"more than three"
    assert file.entry == describe_file(tmp_path, "data")


def test_an_error_ends_the_thread_and_leaves_no_entry(tmp_path: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="stop"), hashed_file(tmp_path / "data") as file:
        file.write(b"something")
        raise RuntimeError("stop")
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="still being written"):
        _ = file.entry


def test_a_file_that_somebody_cuts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="shorter"), hashed_file(tmp_path / "data") as file:
        os.ftruncate(file._file.fileno(), 0)
        with file._grown:  # the thread looks only when it is told, so that it cannot be quicker than the cut
            file._size = 5
            file._grown.notify()

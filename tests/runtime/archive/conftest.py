"""A tiny bundle and its archive."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_archive import ENGINE, write_bundle

from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.pack import pack


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of a few kilobytes with goldens and an engine."""
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(scope="session")
def archive_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive of everything in it, packed once: the disk takes its time to say that it has one."""
    place = tmp_path_factory.mktemp("packed")
    pack(write_bundle(place / "bundle"), place / "model.lvd", PackOptions(engines=(ENGINE,)))
    return (place / "model.lvd").read_bytes()


@pytest.fixture
def archive(archive_bytes: bytes, tmp_path: Path) -> Path:
    """The same in a file."""
    (tmp_path / "model.lvd").write_bytes(archive_bytes)
    return tmp_path / "model.lvd"


@pytest.fixture
def quick_place(tmp_path: Path) -> Iterator[Path]:
    """An empty directory in memory, where there is such a thing: for thousands of files."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)

"""A tiny bundle and its archive."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_archive import ENGINE, write_bundle

from llava_deploy.runtime.archive.contents import PackOptions
from llava_deploy.runtime.archive.pack import pack


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of a few kilobytes with goldens and an engine."""
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def archive(bundle: Path, tmp_path: Path) -> Path:
    """An archive of everything in it."""
    pack(bundle, tmp_path / "model.lvd", PackOptions(engines=(ENGINE,)))
    return tmp_path / "model.lvd"

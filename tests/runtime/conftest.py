"""Bundles that were changed by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llava_deploy.engines.manifest import MANIFEST_NAME, describe_file, read_manifest


@pytest.fixture(scope="session")
def changed() -> Callable[[Path, Path, str, Callable[[Path], object]], Path]:
    """Copy a bundle, without engines; change one file of the copy, and the manifest with it."""

    def make(bundle: Path, to: Path, name: str, change: Callable[[Path], object]) -> Path:
        shutil.copytree(bundle, to, ignore=shutil.ignore_patterns("engines"))
        change(to / name)
        manifest = read_manifest(to)
        files = tuple(describe_file(to, entry.path) for entry in manifest.files)
        (to / MANIFEST_NAME).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
        return to

    return make

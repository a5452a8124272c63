"""Files held against the sizes and sha256 that a manifest lists."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from llava_deploy.engines.errors import BundleError, OptionError
from llava_deploy.engines.manifest import FileEntry, sha256_of

QUICK_LIMIT = 256 << 20
"""Bytes: :attr:`Integrity.QUICK` hashes files up to this size."""


class Integrity(Enum):
    """How closely files are held against the manifest before they are used."""

    QUICK = "quick"
    """Every size, and the sha256 of every file up to :data:`QUICK_LIMIT`."""
    FULL = "full"
    """The sha256 of every file."""


def check_files(root: Path, files: Iterable[FileEntry], integrity: Integrity, *, remedy: str) -> None:
    """Hold files below ``root`` against their entries.

    Raises:
        OptionError: ``integrity`` is none, such as its name; it would be taken for the weaker one.
        BundleError: the first one that differs; ``remedy`` ends the message.
    """
    if not isinstance(integrity, Integrity):
        raise OptionError("integrity", f"want Integrity.QUICK or Integrity.FULL, got {integrity!r}")
    home = root.resolve()
    for entry in files:
        path = root / entry.path
        if not path.is_file():
            raise BundleError(f"{path}: want a file of {entry.size:,} bytes, found none; {remedy}")
        if not path.resolve().is_relative_to(home):
            raise BundleError(f"{path}: leads out of the bundle to {path.resolve()}; {remedy}")
        size = path.stat().st_size
        if size != entry.size:
            raise BundleError(f"{path}: want {entry.size:,} bytes, found {size:,}: the file was altered; {remedy}")
        hashed = integrity is Integrity.FULL or size <= QUICK_LIMIT
        if hashed and (found := sha256_of(path)) != entry.sha256:
            raise BundleError(
                f"{path}: want sha256 {entry.sha256[:12]}…, found {found[:12]}…: the file was altered; {remedy}"
            )

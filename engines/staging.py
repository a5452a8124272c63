"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged_directory(output: Path, *, replace: bool) -> Iterator[Path]:
    """Give a temporary sibling of ``output``, and rename it to ``output`` when the block ends without an error.

    On an error the sibling is removed. A process that is killed leaves a hidden ``.NAME.partial-*`` directory, which
    the next call for the same ``output`` removes once its owner is gone. With ``replace``, an old directory steps aside
    under a hidden name for the moment between two renames, and is put back should the second one fail.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    _sweep(output)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-{os.getpid()}-", dir=output.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        _sync(staging)
        _move_into_place(staging, output, replace=replace)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into_place(staging: Path, output: Path, *, replace: bool) -> None:
    if not (replace and output.exists()):
        staging.rename(output)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-{os.getpid()}-", dir=output.parent))
        old = aside / "old"
        output.rename(old)
        try:
            staging.rename(output)
        except OSError:
            old.rename(output)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _sync(output.parent)


def _sweep(output: Path) -> None:
    """Remove what killed processes left beside ``output``, and put back what one of them had moved aside."""
    prefix = f".{output.name}.partial-"
    for path in output.parent.iterdir():
        pid = path.name.removeprefix(prefix).split("-")[0]
        if path.name.startswith(prefix) and pid.isdigit() and not Path("/proc", pid).exists():
            if (path / "old").exists() and not output.exists():
                (path / "old").rename(output)
            shutil.rmtree(path, ignore_errors=True)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

"""What options name beside a checkpoint has to be there, and an error says which option it was."""

from __future__ import annotations

from pathlib import Path

from llava_deploy.engines.errors import CheckpointError


def require_directory(option: str, path: Path | None) -> None:
    """Refuse a path, given with ``option``, that is no directory.

    Raises:
        CheckpointError: it is none.
    """
    if path is not None and not path.is_dir():
        raise _missing(option, path, "a directory")


def require_file(option: str, path: Path | None) -> None:
    """Refuse a path, given with ``option``, that is no file.

    Raises:
        CheckpointError: it is none.
    """
    if path is not None and not path.is_file():
        raise _missing(option, path, "a file")


def _missing(option: str, path: Path, wanted: str) -> CheckpointError:
    found = "a directory" if path.is_dir() else "a file" if path.is_file() else "nothing there"
    return CheckpointError(f"{option} {path}: want {wanted}, found {found}; correct the path (nothing is downloaded)")

"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llava_deploy.engines.errors import InputError, LlavaDeployError
from llava_deploy.engines.manifest import MANIFEST_NAME

_LOCK, _CONTENT, _ASIDE = "lock", "new", "old"
_MADE = re.compile(r"[a-z0-9_]{8}")  # how tempfile.mkdtemp ends a name
_RELATIVE_TO_HERE, _EXCHANGE = -100, 2  # of renameat2(2): AT_FDCWD, RENAME_EXCHANGE
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)  # the last from a filter of system calls


@contextlib.contextmanager
def staged_directory(output: Path, *, replace: bool) -> Iterator[Path]:
    """Give a temporary sibling of ``output``, and rename it to ``output`` when the block ends without an error.

    On an error the sibling is removed. A process that is killed leaves a hidden ``.NAME.partial-*`` directory, which
    the next call for the same ``output`` removes: its owner held a lock, which no longer exists.

    With ``replace``, an old directory and the new one change names in one step, so that one of them is there at any
    moment. Where the kernel or the file system cannot do that, the old one steps aside under a hidden name for the
    moment between two renames, and is put back should the second one fail, or by the next call should the process be
    killed between them.
    """
    output = output.absolute()
    with _staging_of(output) as staging:
        content = staging / _CONTENT
        content.mkdir()
        yield content
        content.chmod(0o777 & ~_umask())
        _sync_tree(content)
        _move_into_place(content, output, staging / _ASIDE, replace=replace)


@contextlib.contextmanager
def staged_file(output: Path, *, replace: bool) -> Iterator[Path]:
    """Give the name of a file to be made, and rename it to ``output`` when the block ends without an error.

    What holds of :func:`staged_directory` holds here too; an old file is replaced in one step everywhere.

    Raises:
        FileExistsError: ``output`` is there in the end, and ``replace`` is false.
    """
    output = output.absolute()
    with _staging_of(output) as staging:
        content = staging / _CONTENT
        yield content
        _sync(content)
        if not replace and (output.exists() or output.is_symlink()):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(output))
        content.replace(output)
        _sync(output.parent)


def require_free_name(output: Path, *, replace: bool) -> None:
    """Refuse to write a bundle over what is there; nothing but a bundle is ever replaced.

    Raises:
        InputError: ``output`` exists, and ``replace`` is false or it is no bundle.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not replace:
        raise InputError(f"{output}: exists already; choose another directory, or replace it with --force")
    if not (output / MANIFEST_NAME).is_file():
        raise InputError(f"{output}: exists and is not a bundle, which is all that --force replaces; remove it")


def require_space(bundle: Path, wanted: int) -> None:
    """Refuse to begin what the disk has no room for: ``wanted`` bytes of an engine inside ``bundle``.

    Raises:
        LlavaDeployError: there are fewer.
    """
    free = shutil.disk_usage(bundle).free
    if free < wanted:
        raise LlavaDeployError(
            f"{bundle}: the disk is full: the engine wants {wanted:,} bytes, {free:,} are free; "
            "free some space, or run the bundle without an engine"
        )


def require_space_for(output: Path, wanted: int) -> None:
    """Refuse to begin where the disk is plainly too small for a bundle of ``wanted`` bytes at ``output``.

    Raises:
        LlavaDeployError: it is.
    """
    home = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(home).free
    if free < wanted:
        raise LlavaDeployError(
            f"{output}: the disk is full: the bundle wants {wanted:,} bytes, {home} has {free:,} free; "
            "free some space or choose another disk"
        )


def write_error(output: Path, error: OSError) -> LlavaDeployError:
    """What to tell of a system error while ``output`` was being written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LlavaDeployError(
            f"{output}: the disk is full, nothing was written; free some space or choose another disk"
        )
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and output.exists():
        return LlavaDeployError(
            f"{output}: another process wrote it in the meantime, and it stays as it is; "
            "use that, or replace it with --force"
        )
    at = "" if error.filename is None else f" at {error.filename}"
    return LlavaDeployError(f"{output}: not written ({error.strerror or error}{at}); choose another directory")


@contextlib.contextmanager
def _staging_of(output: Path) -> Iterator[Path]:
    """A locked directory beside ``output`` for what is to become it, swept before and removed after."""
    output.parent.mkdir(parents=True, exist_ok=True)
    _sweep(output)
    staging, lock = _create(output)
    try:
        yield staging
    finally:
        _remove(staging)
        os.close(lock)


def _create(output: Path) -> tuple[Path, int]:
    """A staging directory and the handle of its lock; another one where a sweeper was there between the two."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        lock = _lock(staging, os.O_CREAT)
        if lock is not None:
            if (staging / _LOCK).exists():
                return staging, lock
            os.close(lock)


def _move_into_place(content: Path, output: Path, aside: Path, *, replace: bool) -> None:
    if not (replace and output.exists()):
        content.rename(output)
    elif not _exchange(content, output):
        output.rename(aside)
        try:
            content.rename(output)
        except OSError:
            aside.rename(output)
            raise
    _sync(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Have two paths change names in one step; ``False`` where that cannot be done here, and nothing was.

    Source: renameat2(2), in Linux since 3.15 and in glibc since 2.28.

    Raises:
        OSError: it could be done here, and was not.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here = _RELATIVE_TO_HERE
    if renameat2(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sweep(output: Path) -> None:
    """Remove what killed processes left beside ``output``, and put back what one of them had moved aside."""
    prefix = f".{output.name}.partial-"
    for path in output.parent.iterdir():
        if not path.name.startswith(prefix) or not path.is_dir():
            continue
        lock = _lock(path)
        if lock is None:
            # Its owner is at work, or it is none of ours; but an empty one of our making never came to have a lock.
            if _MADE.fullmatch(path.name.removeprefix(prefix)):
                with contextlib.suppress(OSError):
                    path.rmdir()
            continue
        if (path / _ASIDE).exists() and not output.exists():
            (path / _ASIDE).rename(output)
        _remove(path)
        os.close(lock)


def _remove(staging: Path) -> None:
    """Remove a staging directory, its lock last: without one, what a process killed in here left were nobody's."""
    for name in (_CONTENT, _ASIDE):
        path = staging / name
        if path.is_file():
            path.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def _lock(directory: Path, create: int = 0) -> int | None:
    """Lock a staging directory for as long as this process lives; ``None`` where another has it, or it is not one."""
    try:
        handle = os.open(directory / _LOCK, os.O_RDWR | create, 0o600)
    except FileNotFoundError:
        return None
    except OSError:
        if create:
            raise
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if create and not isinstance(error, BlockingIOError):
            return handle  # a file system without locks: a sweeper gets none either, and leaves everything alone
        os.close(handle)
        return None
    return handle


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

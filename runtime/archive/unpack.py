"""Archive to bundle: what the archive's listing says, byte for byte, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES, parse_engine_manifest
from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.manifest import MANIFEST_NAME, FileEntry, Manifest
from llava_deploy.engines.staging import require_free_name, require_space_for, staged_directory, write_error
from llava_deploy.runtime.archive.archive import Archive, open_archive
from llava_deploy.runtime.archive.listing import REMEDY, require_engine

Report = Callable[[int, int], None]
"""Told how many bytes are done, and of how many."""


def unpack(
    archive: Path, output: Path, *, replace: bool = False, on_progress: Report = lambda _done, _total: None
) -> Manifest:
    """Write the bundle in ``archive`` to the directory ``output``, whole or not at all.

    Nothing is written before the archive's header, listing and manifest were read and agree. With ``replace`` an old
    bundle stays as it was until the new one is whole.

    Returns:
        The bundle's manifest.

    Raises:
        InputError: ``output`` exists, and ``replace`` is false or it is no bundle.
        BundleError: the archive is none, is damaged, or holds anything that it does not list, or otherwise.
        LlavaDeployError: the archive cannot be read, ``output`` cannot be written, or the disk is too small.
    """
    require_free_name(output, replace=replace)
    with open_archive(archive) as opened:
        require_space_for(output, opened.content_size)
        try:
            with staged_directory(output, replace=replace) as staging:
                _write(opened, staging, on_progress)
        except OSError as error:
            raise write_error(output, error) from error
        return opened.manifest


def _write(archive: Archive, directory: Path, on_progress: Report) -> None:
    total = sum(entry.size for entry in archive.listing.members)
    done = len(archive.manifest_content)
    (directory / MANIFEST_NAME).write_bytes(archive.manifest_content)

    @contextlib.contextmanager
    def sink(entry: FileEntry) -> Iterator[Callable[[bytes], None]]:
        place = directory / entry.path
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("xb") as file:

            def take(chunk: bytes) -> None:
                nonlocal done
                file.write(chunk)
                done += len(chunk)
                on_progress(done, total)

            yield take

    archive.read_members(sink)
    for name in archive.listing.engines:
        _require_engine(archive, directory, name)


def _require_engine(archive: Archive, directory: Path, name: str) -> None:
    path = f"{ENGINES}/{name}/{ENGINE_MANIFEST}"
    if not (directory / path).is_file():
        raise BundleError(f"{archive.path}: lacks {path!r}, without which the engine's files are nothing; {REMEDY}")
    content = (directory / path).read_bytes()
    engine = parse_engine_manifest(content, where=f"{archive.path}, {path}", remedy=REMEDY)
    require_engine(archive.listing, name, engine, where=str(archive.path))

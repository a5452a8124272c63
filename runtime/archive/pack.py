"""Bundle to archive: the same bundle gives the same bytes, whoever packs it, where and when."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zstandard

from llava_deploy.engines.errors import BundleError, InputError, LlavaDeployError
from llava_deploy.engines.manifest import FileEntry
from llava_deploy.engines.staging import staged_file, write_error
from llava_deploy.runtime.archive.contents import Member, PackOptions, choose_contents
from llava_deploy.runtime.archive.frame import HARMLESS, LARGEST_FACTOR, compressor, is_archive
from llava_deploy.runtime.archive.layout import END, member_header, padded, padding
from llava_deploy.runtime.archive.listing import (
    LARGEST_JSON,
    LISTING_NAME,
    Listing,
    content_length,
    listing_of,
    parse_listing,
)

Report = Callable[[int, int], None]
"""Told how many bytes are done, and of how many."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Packed:
    """An archive that was written.

    Attributes:
        listing: what is in it.
        size: of the file, in bytes.
        weights: bytes of the weights in it, before they were packed.
        doubled: bytes of engines' files that the bundle has as well, so that they are in it twice.
    """

    listing: Listing
    size: int
    weights: int
    doubled: int


class _Sink(Protocol):
    def write(self, content: bytes, /) -> int: ...


def pack(
    bundle: Path,
    output: Path,
    options: PackOptions | None = None,
    *,
    replace: bool = False,
    on_progress: Report = lambda _done, _total: None,
) -> Packed:
    """Write ``bundle`` to the file ``output``, whole or not at all.

    Every file is held against the manifest while it is read. Equal bundles give equal bytes with the same version of
    zstandard; what is in the frame is equal with all of them.

    Args:
        bundle: a bundle's directory.
        output: the archive.
        options: what goes into it; :class:`PackOptions` by default.
        replace: put it in the place of an archive that is there.
        on_progress: told of it.

    Raises:
        InputError: ``output`` exists, and ``replace`` is false or it is no archive; or it lies in the bundle.
        BundleError: the bundle is damaged, holds what its manifest does not list, or lacks goldens.
        OptionError: an engine that is not there, or nothing that would run.
        LlavaDeployError: a file cannot be read or written, or the disk is full.
    """
    output = _place(bundle, output, replace=replace)
    contents = choose_contents(bundle, PackOptions() if options is None else options)
    listing = listing_of(contents.manifest, (member.entry for member in contents.members))
    head = _checked_listing(listing, bundle)
    length = content_length(listing, len(head))
    by_path = {member.entry.path: member for member in contents.members}
    progress = _Progress(contents.size, on_progress)
    try:
        with staged_file(output, replace=replace) as place:
            with place.open("xb") as file:
                sink = compressor().stream_writer(file, size=length)
                sink.write(member_header(LISTING_NAME, len(head)) + padded(head))
                with ThreadPoolExecutor(1) as hasher:
                    for entry in listing.members:
                        _write_member(by_path[entry.path], sink, hasher, progress)
                sink.write(END)
                sink.flush(zstandard.FLUSH_FRAME)
                size = file.tell()
            _require_readable(bundle, size, length)
    except OSError as error:
        raise write_error(output, error) from error
    except zstandard.ZstdError as error:
        raise LlavaDeployError(f"{output}: not written, zstd failed: {error}; try again with more memory") from error
    return Packed(listing, size, contents.weights, contents.doubled)


class _Progress:
    def __init__(self, total: int, report: Report) -> None:
        self._done, self._total, self._report = 0, total, report

    def add(self, count: int) -> None:
        self._done += count
        self._report(self._done, self._total)


def _place(bundle: Path, output: Path, *, replace: bool) -> Path:
    """Where to write; refuse what is never replaced."""
    if output.exists() or output.is_symlink():
        if not replace:
            raise InputError(f"{output}: exists already; choose another name, or replace it with --force")
        if not is_archive(output):
            raise InputError(f"{output}: exists and is no archive, which is all that --force replaces; remove it")
    place = output.resolve()  # through a link, not in its place
    if place.is_relative_to(bundle.resolve()):
        raise InputError(f"{output}: lies in the bundle that is to be packed; choose another directory")
    return place


def _checked_listing(listing: Listing, bundle: Path) -> bytes:
    """The listing's bytes, read again as :func:`unpack` will: what could not be unpacked is not packed."""
    content = listing.to_bytes()
    if len(content) > LARGEST_JSON:
        raise BundleError(f"{bundle}: has {len(listing.members):,} files, too many to pack")
    parse_listing(content, where=str(bundle))
    return content


def _write_member(member: Member, sink: _Sink, hasher: ThreadPoolExecutor, progress: _Progress) -> None:
    entry = member.entry
    sink.write(member_header(entry.path, entry.size))
    if isinstance(member.source, bytes):
        sink.write(member.source)
        progress.add(entry.size)
    else:
        _copy(member.source, entry, sink, hasher, progress)
    sink.write(padding(entry.size))


def _copy(path: Path, entry: FileEntry, sink: _Sink, hasher: ThreadPoolExecutor, progress: _Progress) -> None:
    """Hand a file's bytes on while another thread hashes them.

    Raises:
        BundleError: they are not those of its entry.
        LlavaDeployError: it cannot be read.
    """
    digest, left = hashlib.sha256(), entry.size
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise _unreadable(path, error) from error
    with io.FileIO(handle) as file:
        while chunk := _read(file, path):
            if len(chunk) > left:
                raise _altered(path, f"{entry.size:,} bytes, found more")
            left -= len(chunk)
            hashing = hasher.submit(digest.update, chunk)
            sink.write(chunk)
            hashing.result()
            progress.add(len(chunk))
    if left:
        raise _altered(path, f"{entry.size:,} bytes, found {entry.size - left:,}")
    if digest.hexdigest() != entry.sha256:
        raise _altered(path, f"sha256 {entry.sha256[:12]}…, found {digest.hexdigest()[:12]}…")


def _read(file: io.FileIO, path: Path) -> bytes:
    try:
        return file.read(_CHUNK)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> LlavaDeployError:
    return LlavaDeployError(f"{path}: cannot be read ({error.strerror}); check its permissions, or make it again")


def _altered(path: Path, found: str) -> BundleError:
    return BundleError(f"{path}: want {found}: the file was altered; export the bundle again")


def _require_readable(bundle: Path, size: int, length: int) -> None:
    """Refuse to leave behind what :func:`unpack` would take for a bomb."""
    if length > max(HARMLESS, LARGEST_FACTOR * size):
        raise BundleError(
            f"{bundle}: {length:,} bytes came to {size:,}, less than 1 in {LARGEST_FACTOR}: its weights are all but "
            "the same number; export it from a checkpoint that was trained"
        )

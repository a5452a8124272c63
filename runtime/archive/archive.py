"""An archive that is open: what it is, from its first two members, and then the others, each held against its entry."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest
from llava_deploy.runtime.archive.frame import Frame, open_frame
from llava_deploy.runtime.archive.layout import (
    BLOCK,
    END,
    describe_header,
    member_header,
    padding,
    size_in_header,
)
from llava_deploy.runtime.archive.listing import (
    LARGEST_JSON,
    LISTING_NAME,
    REMEDY,
    Listing,
    content_length,
    parse_listing,
    require_manifest,
)

CHUNK = 1 << 20
"""Bytes of a member that are read, hashed and written at once."""

Sink: TypeAlias = "Callable[[FileEntry], contextlib.AbstractContextManager[Callable[[bytes], object]]]"
"""Gives, for a member, what takes its content, piece by piece."""

_HASHED_ALONGSIDE = 1 << 16  # bytes from which on another thread is worth its while


@dataclass(frozen=True)
class Archive:
    """An archive of which the listing and the manifest were read, and agree.

    Attributes:
        size: of the file, in bytes.
        content_size: of the tar in it, in bytes.
        listing: what it says that it holds.
        manifest: of the bundle.
        manifest_content: its bytes.
        frame: where the members after it are read from, once.
    """

    path: Path
    size: int
    content_size: int
    listing: Listing
    manifest: Manifest
    manifest_content: bytes
    frame: Frame

    def read_members(self, sink: Sink) -> None:
        """Read what follows the manifest to the end of the file, and hand it to ``sink``.

        Raises:
            BundleError: something is not as the listing says, byte for byte.
        """
        with ThreadPoolExecutor(1) as hasher:
            for entry in self.listing.members[1:]:
                _expect(self.frame, entry, self.listing)
                with sink(entry) as take:
                    _read_content(self.frame, entry, take, hasher)
        if (found := self.frame.take(len(END))) != END:
            raise BundleError(
                f"{self.path}: want the archive's end, found {describe_header(found[:BLOCK])}, which {LISTING_NAME} "
                f"does not list; {REMEDY}"
            )
        self.frame.finish()


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open an archive, and read what it is.

    Raises:
        BundleError: it is none, is damaged, or its listing, its manifest and its size do not agree.
        LlavaDeployError: the file cannot be read.
    """
    with open_frame(path) as frame:
        listing = _read_listing(frame)
        entry = listing.members[0]
        _expect(frame, entry, listing)
        parts: list[bytes] = []
        with ThreadPoolExecutor(1) as hasher:
            _read_content(frame, entry, parts.append, hasher)
        content = b"".join(parts)
        manifest = parse_manifest(content, where=f"{path}, {MANIFEST_NAME}")
        require_manifest(listing, manifest, where=str(path))
        yield Archive(path, frame.size, frame.content_size, listing, manifest, content, frame)


def _read_listing(frame: Frame) -> Listing:
    block = frame.take(BLOCK)
    size = size_in_header(block)
    if size is None or block != member_header(LISTING_NAME, size):
        raise BundleError(
            f"{frame.path}: want {LISTING_NAME} first, as llava-deploy pack writes it, found {describe_header(block)}; "
            f"{REMEDY}"
        )
    if not 0 < size <= LARGEST_JSON:
        raise BundleError(f"{frame.path}: want at most {LARGEST_JSON:,} bytes of {LISTING_NAME}, found {size:,}")
    listing = parse_listing(frame.take(size), where=f"{frame.path}, {LISTING_NAME}")
    _expect_padding(frame, LISTING_NAME, size)
    wanted = content_length(listing, size)
    if wanted != frame.content_size:
        less = wanted < frame.content_size
        raise BundleError(
            f"{frame.path}: its frame has {frame.content_size:,} bytes, {LISTING_NAME} accounts for {wanted:,}: "
            f"{'there is something in it that is not listed' if less else 'something is missing'}; {REMEDY}"
        )
    return listing


def _expect(frame: Frame, entry: FileEntry, listing: Listing) -> None:
    """Read what has to stand before a member's content, block by block, so that a difference is named."""
    wanted = member_header(entry.path, entry.size)
    for at in range(0, len(wanted), BLOCK):
        found = frame.take(BLOCK)
        if found != wanted[at : at + BLOCK]:
            raise BundleError(
                f"{frame.path}: want {entry.path!r} of {entry.size:,} bytes, found {describe_header(found)}"
                f"{_verdict(found, entry, listing)}; {REMEDY}"
            )


def _verdict(block: bytes, wanted: FileEntry, listing: Listing) -> str:
    """What is wrong with a header that is not the wanted one, where that can be told by its name."""
    name = block[:100].partition(b"\0")[0].decode("utf-8", "backslashreplace")
    paths = [entry.path for entry in listing.members]
    if name.startswith("/"):
        return ", an absolute path"
    if ".." in name.split("/"):
        return ", a path with '..'"
    if not any(block) or block[156:157] not in b"\x000":
        return ""
    if name == wanted.path:
        return ", whose header is another than llava-deploy pack writes"
    if name in paths[: paths.index(wanted.path)] or name == LISTING_NAME:
        return ", for the second time"
    return ", out of its turn" if name in paths else f", which {LISTING_NAME} does not list"


def _read_content(frame: Frame, entry: FileEntry, take: Callable[[bytes], object], hasher: ThreadPoolExecutor) -> None:
    """Hand a member's content on while another thread hashes it."""
    digest = hashlib.sha256()
    left = entry.size
    hashing = None
    while left:
        chunk = frame.read(min(left, CHUNK))
        left -= len(chunk)
        if hashing is not None:
            hashing.result()
            hashing = None
        if len(chunk) >= _HASHED_ALONGSIDE:
            hashing = hasher.submit(digest.update, chunk)
        else:
            digest.update(chunk)
        take(chunk)
    if hashing is not None:
        hashing.result()
    if digest.hexdigest() != entry.sha256:
        raise BundleError(
            f"{frame.path}: want sha256 {entry.sha256[:12]}… of {entry.path!r}, found {digest.hexdigest()[:12]}…: "
            f"it was altered; {REMEDY}"
        )
    _expect_padding(frame, entry.path, entry.size)


def _expect_padding(frame: Frame, path: str, size: int) -> None:
    if any(frame.take(len(padding(size)))):
        raise BundleError(f"{frame.path}: want zeros after {path!r} up to the next block, found other bytes; {REMEDY}")

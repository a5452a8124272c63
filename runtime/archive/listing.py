"""``archive.json``, an archive's first member: what it is, and every file in it with its size and sha256."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from llava_deploy.engines.engine_manifest import ENGINE_MANIFEST, ENGINES, EngineManifest
from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.manifest import MANIFEST_NAME, FileEntry, Manifest, require_paths
from llava_deploy.engines.plain import from_plain
from llava_deploy.runtime.archive.layout import END, length_of

LISTING_NAME = "archive.json"
ARCHIVE_FORMAT_VERSION = 1
LARGEST_JSON = 4 << 20
"""Bytes of ``archive.json``, ``manifest.json`` and each ``engine.json``: they are read into memory whole. Those of a
model with a long chat template have a few tens of thousands."""

REMEDY = "do not use it; pack it or copy it again"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_PART = 255  # bytes of a file's name on Linux
_LONGEST_PATH = 1024


@dataclass(frozen=True)
class Listing:
    """The whole of ``archive.json``.

    Attributes:
        model: its name, for people.
        precision: of the weights, for people.
        engines: names of the engines' directories, for people.
        members: every file but this one, in the order in which they lie in the archive: the manifest, then by path.
    """

    format_version: int
    kind: Literal["llava-deploy-bundle"]
    model: str
    precision: str
    engines: tuple[str, ...]
    members: tuple[FileEntry, ...]

    def to_bytes(self) -> bytes:
        """The file. ASCII, so that any text of a model's name can be written."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode("ascii")


def listing_of(manifest: Manifest, members: Iterable[FileEntry]) -> Listing:
    """The listing of an archive of a bundle's ``members``, put in order."""
    ordered = sorted(members, key=lambda entry: (entry.path != MANIFEST_NAME, entry.path))
    engines = sorted({entry.path.split("/")[1] for entry in ordered if of_engine(entry.path)})
    model = manifest.model
    return Listing(
        ARCHIVE_FORMAT_VERSION, "llava-deploy-bundle", model.name, model.precision, tuple(engines), tuple(ordered)
    )


def parse_listing(content: bytes, *, where: str) -> Listing:
    """The listing that the bytes of an ``archive.json`` are.

    Raises:
        BundleError: it is not JSON, not of this form or version, not written as :meth:`Listing.to_bytes` writes it, or
            lists what cannot be unpacked.
    """
    try:
        data = json.loads(content.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not JSON ({error}); {REMEDY}") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != ARCHIVE_FORMAT_VERSION:
        raise BundleError(
            f"{where}: want format_version {ARCHIVE_FORMAT_VERSION}, found {version!r:.80}; "
            "unpack it with the version of llava-deploy that packed it"
        )
    try:
        listing: Listing = from_plain(Listing, data, "archive")
    except (TypeError, OverflowError) as error:
        raise BundleError(f"{where}: {error}; {REMEDY}") from error
    _require_members(listing.members, where)
    if listing.to_bytes() != content:
        raise BundleError(f"{where}: want the text that llava-deploy writes of this listing, found another; {REMEDY}")
    return listing


def content_length(listing: Listing, listing_size: int) -> int:
    """Bytes of the whole tar."""
    return length_of((FileEntry(LISTING_NAME, listing_size, ""), *listing.members)) + len(END)


def require_manifest(listing: Listing, manifest: Manifest, *, where: str) -> None:
    """Hold a listing against the manifest that it is to be of; engines are held against theirs.

    Raises:
        BundleError: it lists a file that the manifest does not, or otherwise, or the other way round.
    """
    listed = [entry for entry in listing.members if entry.path != MANIFEST_NAME and not _below_engines(entry.path)]
    _require_same(listed, manifest.files, MANIFEST_NAME, where)
    if listing != listing_of(manifest, listing.members):
        raise BundleError(
            f"{where}: says that it is {listing.model!r:.80} in {listing.precision!r:.80} with engines "
            f"{list(listing.engines)!r:.200}, which its members are not; {REMEDY}"
        )


def require_engine(listing: Listing, name: str, engine: EngineManifest, *, where: str) -> None:
    """Hold what a listing has of the engine ``name`` against the engine's manifest.

    Raises:
        BundleError: a file is missing, differs, or is not listed there.
    """
    home = f"{ENGINES}/{name}/"
    listed = [entry for entry in listing.members if entry.path.startswith(home)]
    rest = [entry for entry in listed if entry.path != f"{home}{ENGINE_MANIFEST}"]
    wanted = [dataclasses.replace(entry, path=f"{home}{entry.path}") for entry in engine.files]
    _require_same(rest, wanted, f"{home}{ENGINE_MANIFEST}", where)


def of_engine(path: str) -> bool:
    """Whether a path is of a file in an engine's directory."""
    return _below_engines(path) and path.count("/") > 1


def _below_engines(path: str) -> bool:
    return path.startswith(f"{ENGINES}/")


def _require_same(found: Iterable[FileEntry], wanted: Iterable[FileEntry], by: str, where: str) -> None:
    have, want = {entry.path: entry for entry in found}, {entry.path: entry for entry in wanted}
    for path in sorted(have.keys() | want.keys()):
        if path not in want:
            raise BundleError(f"{where}: holds {path!r}, which {by} does not list; {REMEDY}")
        if path not in have:
            raise BundleError(f"{where}: lacks {path!r}, which {by} lists; {REMEDY}")
        if have[path] != want[path]:
            raise BundleError(f"{where}: holds {path!r} of another size or sha256 than {by} says; {REMEDY}")


def _require_members(members: tuple[FileEntry, ...], where: str) -> None:
    require_paths(members, where=where)
    paths = [entry.path for entry in members]
    if paths[:1] != [MANIFEST_NAME] or paths[1:] != sorted(paths[1:]):
        raise BundleError(f"{where}: want {MANIFEST_NAME} first, then the others by their paths; {REMEDY}")
    directories = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    for entry in members:
        if entry.path in directories or entry.path == LISTING_NAME:
            raise BundleError(f"{where}: {entry.path!r} cannot be a file of a bundle; {REMEDY}")
        if _below_engines(entry.path) and not of_engine(entry.path):
            raise BundleError(f"{where}: {entry.path!r} is of no engine; {REMEDY}")
        name = entry.path.encode("utf-8")
        if len(name) > _LONGEST_PATH or max(map(len, name.split(b"/"))) > _LONGEST_PART:
            raise BundleError(f"{where}: the path {entry.path!r:.80} is too long to be unpacked; {REMEDY}")
        if entry.size < 0 or not _SHA256.fullmatch(entry.sha256):
            raise BundleError(f"{where}: want a size and a sha256 of {entry.path!r}, found {entry!r:.200}; {REMEDY}")
        if entry.size > LARGEST_JSON and (entry.path == MANIFEST_NAME or entry.path.endswith(f"/{ENGINE_MANIFEST}")):
            raise BundleError(
                f"{where}: want at most {LARGEST_JSON:,} bytes of {entry.path!r}, found {entry.size:,}; {REMEDY}"
            )


def describe_bytes(path: str, content: bytes) -> FileEntry:
    """The entry for a file of these bytes."""
    return FileEntry(path, len(content), hashlib.sha256(content).hexdigest())

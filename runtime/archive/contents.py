"""What of a bundle goes into an archive: chosen by options, and nothing that a manifest does not list."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llava_deploy.engines.engine_manifest import (
    ENGINE_MANIFEST,
    ENGINES,
    EngineManifest,
    built_engines,
    parse_engine_manifest,
    source_digest,
)
from llava_deploy.engines.errors import BundleError, InputError, LlavaDeployError, OptionError
from llava_deploy.engines.goldens import GOLDENS, has_goldens, read_goldens
from llava_deploy.engines.manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest, require_paths
from llava_deploy.runtime.archive.listing import LARGEST_JSON, LISTING_NAME, describe_bytes

ALL_ENGINES = "all"
_WEIGHTS = (".onnx.data", ".plan", ".npy")


@dataclass(frozen=True)
class PackOptions:
    """What goes into an archive.

    Attributes:
        engines: names of directories below ``engines/``, or ``("all",)``. An engine runs with one version of its
            backend on one kind of device.
        graphs: the canonical graphs, which run everywhere and engines are built from.
        goldens: answers of PyTorch for a self-test; where they are wanted, the bundle must have them.
    """

    engines: tuple[str, ...] = ()
    graphs: bool = True
    goldens: bool = True


@dataclass(frozen=True)
class Member:
    """A file to pack: its entry, and its bytes or where they are."""

    entry: FileEntry
    source: Path | bytes


@dataclass(frozen=True)
class Contents:
    """What goes into an archive: the manifest that it will have, and its members in any order."""

    manifest: Manifest
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Bytes of all members."""
        return sum(member.entry.size for member in self.members)

    @property
    def doubled(self) -> int:
        """Bytes of engines' files that the bundle has as well: onnxruntime-cuda's have the weights of the graphs."""
        built = [member.entry for member in self.members if member.entry.path.startswith(f"{ENGINES}/")]
        others = {member.entry.sha256 for member in self.members if member.entry not in built}
        return sum(entry.size for entry in built if entry.sha256 in others)

    @property
    def weights(self) -> int:
        """Bytes of the graphs' weights, the token embeddings, and what engines are made of."""
        paths = [(member.entry.path, member.entry.size) for member in self.members]
        return sum(size for path, size in paths if path.endswith(_WEIGHTS) and not path.startswith(f"{GOLDENS}/"))


def choose_contents(bundle: Path, options: PackOptions) -> Contents:
    """Choose what to pack of ``bundle``. Reads its manifests; its other files are only looked at.

    Raises:
        BundleError: no bundle, damaged, with files that no manifest lists, with links, or without goldens where they
            are wanted.
        OptionError: an engine that is not there, or no graphs and no engine either.
        LlavaDeployError: a file cannot be read.
    """
    content, manifest = _read_manifest(bundle)
    engines = _chosen(bundle, options)
    _require_runnable(bundle, manifest, options, engines)
    _require_listed(bundle, {MANIFEST_NAME, *(entry.path for entry in manifest.files)}, apart=ENGINES)
    if options.goldens:
        _require_goldens(bundle, manifest)
    packed = _without(manifest, options)
    if packed != manifest:
        content = _encoded(bundle, packed)
    members = [Member(describe_bytes(MANIFEST_NAME, content), content)]
    members += [Member(entry, bundle / entry.path) for entry in packed.files]
    for name in engines:
        members += _engine_members(bundle, name, manifest)
    return Contents(packed, tuple(members))


def engine_names(bundle: Path) -> list[str]:
    """Names of the engines of a bundle."""
    return [engine.name for engine in built_engines(bundle)]


def _read_manifest(bundle: Path) -> tuple[bytes, Manifest]:
    where = bundle / MANIFEST_NAME
    if not where.is_file():
        raise BundleError(
            f"{bundle}: want a bundle directory with {MANIFEST_NAME}, found none; "
            "make one with: llava-deploy export CHECKPOINT -o BUNDLE"
        )
    content = _json_of(where)
    manifest = parse_manifest(content, where=str(where))
    if any(entry.path in (LISTING_NAME, ENGINES) or entry.path.startswith(f"{ENGINES}/") for entry in manifest.files):
        raise BundleError(
            f"{where}: lists {LISTING_NAME} or files of engines, which it cannot; export the bundle again"
        )
    return content, manifest


def _json_of(path: Path) -> bytes:
    """A small file that is packed as it was read."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise BundleError(f"{path}: want at most {LARGEST_JSON:,} bytes, found {size:,}; make it again")
        return path.read_bytes()
    except OSError as error:
        raise LlavaDeployError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _chosen(bundle: Path, options: PackOptions) -> list[str]:
    there = engine_names(bundle)
    if options.engines == (ALL_ENGINES,) and there:
        return there
    for name in options.engines:
        if name not in there:
            found = f"{', '.join(there)}, or {ALL_ENGINES}" if there else "an engine, of which the bundle has none"
            raise OptionError("engine", f"want {found}, got {name!r}; llava-deploy build {bundle} makes engines")
    return sorted({*options.engines})


def _require_runnable(bundle: Path, manifest: Manifest, options: PackOptions, engines: list[str]) -> None:
    if engines:
        return
    if not options.graphs:
        raise OptionError("no_graphs", "nothing would be left that runs; choose an engine too, with --engine")
    if any(_is_of_graph(entry) for entry in manifest.left_out):
        raise InputError(
            f"{bundle}: has no graphs, since it was packed without; nothing would be left that runs: choose an engine "
            "with --engine, or pack the bundle that it came from"
        )


def _require_goldens(bundle: Path, manifest: Manifest) -> None:
    if not has_goldens(manifest):
        raise BundleError(
            f"{bundle}: want goldens, PyTorch's answers for the test where it will run, found none; record them with: "
            f"llava-deploy record CHECKPOINT {bundle}, or pack it --without-goldens"
        )
    read_goldens(bundle, manifest)


def _without(manifest: Manifest, options: PackOptions) -> Manifest:
    """The manifest of what is packed. Graphs are remembered, since engines are known by what they were built from."""
    files = [entry for entry in manifest.files if options.goldens or not entry.path.startswith(f"{GOLDENS}/")]
    left = [] if options.graphs else [entry for entry in files if _is_of_graph(entry)]
    files = [entry for entry in files if entry not in left]
    left_out = sorted((*manifest.left_out, *left), key=lambda entry: entry.path)
    return replace(manifest, files=tuple(files), left_out=tuple(left_out))


def _is_of_graph(entry: FileEntry) -> bool:
    return ".onnx" in entry.path


def _encoded(bundle: Path, manifest: Manifest) -> bytes:
    try:
        return manifest.to_json().encode("utf-8")
    except UnicodeEncodeError as error:
        raise BundleError(f"{bundle / MANIFEST_NAME}: holds text that is none ({error}); export it again") from error


def _engine_members(bundle: Path, name: str, manifest: Manifest) -> list[Member]:
    directory = bundle / ENGINES / name
    where = directory / ENGINE_MANIFEST
    again = "build it again with: llava-deploy build"
    content = _json_of(where)
    engine: EngineManifest = parse_engine_manifest(content, where=str(where), remedy=again)
    require_paths(engine.files, where=str(where))
    if engine.key.source != source_digest(manifest):
        raise BundleError(
            f"{directory}: was built from other graphs than the bundle's, or by another version of llava-deploy; "
            f"{again}, or leave it out"
        )
    _require_no_link(directory.parent)
    _require_no_link(directory)
    _require_listed(directory, {ENGINE_MANIFEST, *(entry.path for entry in engine.files)}, apart=None)
    home = f"{ENGINES}/{name}"
    members = [Member(describe_bytes(f"{home}/{ENGINE_MANIFEST}", content), content)]
    return members + [Member(replace(e, path=f"{home}/{e.path}"), directory / e.path) for e in engine.files]


def _require_listed(root: Path, listed: set[str], *, apart: str | None) -> None:
    """Refuse files that are missing or that nobody lists, links, and everything else that is no file.

    The directory ``apart`` is not looked into: engines are chosen one by one.
    """
    found = {path.relative_to(root).as_posix(): path for path in _files(root, apart)}
    for path in sorted(found.keys() | listed):
        if path not in listed:
            raise BundleError(f"{found[path]}: stands in no manifest; move it elsewhere, then pack again")
        if path not in found:
            raise BundleError(f"{root / path}: want a file, found none; make the bundle again")
        _require_plain(found[path])


def _files(root: Path, apart: str | None) -> Iterator[Path]:
    for directory, directories, files in os.walk(root):
        here = Path(directory)
        if here == root and apart in directories:
            directories.remove(apart)
        for name in directories:
            _require_no_link(here / name)
        yield from (here / name for name in files)


def _require_plain(path: Path) -> None:
    _require_no_link(path)
    if not path.is_file():
        raise BundleError(f"{path}: want a file, found {stat.filemode(path.stat().st_mode)}; remove it")


def _require_no_link(path: Path) -> None:
    if path.is_symlink():
        raise BundleError(f"{path}: a link to {path.readlink()}; an archive holds none: put the file itself there")

"""What a hostile or damaged archive may hold, one by one: it is refused, named, and nothing is written."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from tiny_archive import (
    ENGINE,
    entries_of,
    framed,
    listing_for,
    manifest_of,
    members_of,
    tar_in,
    tar_of,
    tree,
    with_header,
)

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.manifest import MANIFEST_NAME, FileEntry
from llava_deploy.runtime.archive.frame import MAGIC
from llava_deploy.runtime.archive.unpack import unpack

Bytes = Callable[[bytes], bytes]
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"


@pytest.fixture
def refused(archive: Path, tmp_path: Path) -> Callable[[bytes], str]:
    """The message on an archive of these bytes, beside which nothing has changed."""

    def try_it(content: bytes) -> str:
        archive.write_bytes(content)
        before = tree(tmp_path)
        with pytest.raises(BundleError) as raised:
            unpack(archive, tmp_path / "again")
        assert tree(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["model.lvd"]
        return str(raised.value)

    return try_it


def test_the_archive_that_these_are_made_of_is_taken(archive: Path, tmp_path: Path) -> None:
    tar = tar_in(archive.read_bytes())
    assert tar_of(members_of(tar)) == tar
    archive.write_bytes(framed(tar))
    unpack(archive, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: b"", "a zstd frame, found an empty one"),
        (lambda a: b"PK\x03\x04" + a, "a zstd frame, found one that begins with b'PK"),
        (tar_in, "a zstd frame, found one that begins with b'archive."),
        (lambda a: MAGIC, "no header of a zstd frame"),
        (lambda a: MAGIC + b"\x08" + a[5:], "damaged"),
        (lambda a: SKIPPABLE + a, "a zstd frame, found one that begins with"),
        (lambda a: a[:-1], "cut short"),
        (lambda a: a[: len(a) // 2], "cut short"),
        (lambda a: a[:20], "cut short"),
        (lambda a: a + b"\0", "found more data behind it"),
        (lambda a: a + a, "found a second frame behind it"),
        (lambda a: a + framed(b""), "found a second frame behind it"),
        (lambda a: a + SKIPPABLE, "found a second frame behind it"),
        (lambda a: a[:-1] + bytes([a[-1] ^ 1]), "damaged"),
        (lambda a: framed(tar_in(a), checksum=False), "want a frame with a checksum"),
        (lambda a: framed(tar_in(a), size=False), "want a frame with its content's size"),
        (lambda a: MAGIC + bytes([a[4] | 1, 7]) + a[5:], "want a frame with no dictionary"),
    ],
)
def test_frames(change: Bytes, message: str, archive: Path, refused: Callable[[bytes], str]) -> None:
    assert message in refused(change(archive.read_bytes()))


def claiming(size: int, blocks: bytes, *, window: int = 0x50) -> bytes:
    """A frame by hand: its content's size in eight bytes, a window of 1 MiB, a checksum."""
    return MAGIC + bytes([0b11000100, window]) + size.to_bytes(8, "little") + blocks


RLE = b"\x02\x00\x10\0"  # 128 KiB of zeros in four bytes, not the last block
BOMB = RLE * 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (claiming(1 << 44, b"\x01\0\0" + bytes(4)), "a decompression bomb: 21 bytes that promise to become 17,592,186"),
        (claiming(20_000 << 17, BOMB), "a decompression bomb: 80,014 bytes that promise to become 2,621,440,000"),
        (claiming(5000, BOMB), "damaged"),
        (claiming(16 << 20, RLE * 128 + b"\x01\0\0" + bytes(4)), "want archive.json first"),
        (claiming((1 << 64) - 2, b""), "a decompression bomb"),
        (claiming(5000, BOMB, window=0x70), "want a frame with a window of at most 8,388,608 bytes, found one of 16"),
        (claiming(5000, BOMB, window=0xFF), "too much memory"),
        (claiming(5000, b"\x06\0\0"), "damaged: a block of kind 3"),
        (claiming(5000, b"\xf8\xff\xff"), "damaged: a block of kind 0 and 2,097,151 bytes"),
    ],
    ids=["claims", "bomb", "liar", "zeros", "largest", "window", "widest", "reserved", "long"],
)
def test_bombs_and_liars(content: bytes, message: str, refused: Callable[[bytes], str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in refused(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"kind": b"2", "link": "/etc/passwd"}, "found a symbolic link 'tokenizer.json' to '/etc/passwd'"),
        ({"kind": b"1", "link": "manifest.json"}, "found a hard link 'tokenizer.json' to 'manifest.json'"),
        ({"kind": b"5"}, "found a directory 'tokenizer.json'"),
        ({"kind": b"3"}, "found a character device 'tokenizer.json'"),
        ({"kind": b"4"}, "found a block device 'tokenizer.json'"),
        ({"kind": b"6"}, "found a pipe 'tokenizer.json'"),
        ({"kind": b"x"}, "found an extended header 'tokenizer.json'"),
        ({"kind": b"g"}, "found a global extended header 'tokenizer.json'"),
        ({"kind": b"L"}, "found GNU tar's long name 'tokenizer.json'"),
        ({"kind": b"\xff"}, "found a member of unknown kind"),
        ({"kind": b"\0"}, "whose header is another than llava-deploy pack writes"),
        ({"mode": 0o4755}, "whose header is another than llava-deploy pack writes"),
        ({"name": "/etc/cron.d/x"}, "found a file '/etc/cron.d/x' of 2 bytes, an absolute path"),
        ({"name": "../../x"}, "found a file '../../x' of 2 bytes, a path with '..'"),
        ({"name": "manifest.json"}, "found a file 'manifest.json' of 2 bytes, for the second time"),
        ({"name": "archive.json"}, "found a file 'archive.json' of 2 bytes, for the second time"),
        ({"name": "vision.onnx"}, "found a file 'vision.onnx' of 2 bytes, out of its turn"),
        ({"name": "evil.py"}, "found a file 'evil.py' of 2 bytes, which archive.json does not list"),
    ],
)
def test_members(header: dict[str, Any], message: str, archive: Path, refused: Callable[[bytes], str]) -> None:
    text = refused(framed(with_header(tar_in(archive.read_bytes()), "tokenizer.json", **header)))
    assert message in text
    assert "want 'tokenizer.json' of 2 bytes, " in text


def swapped(tar: bytes, old: bytes, new: bytes) -> bytes:
    assert tar.count(old) == 1
    return tar.replace(old, new)


def after(tar: bytes, path: str) -> int:
    """Where a member's content ends."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        member = opened.getmember(path)
        return member.offset_data + member.size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: swapped(t, b"a graph" * 9, b"a grape" * 9), "want sha256"),
        (lambda t: t[: after(t, "tokenizer.json")] + b"\1" + t[after(t, "tokenizer.json") + 1 :], "want zeros after"),
        (lambda t: t[: after(t, "archive.json")] + b"\1" + t[after(t, "archive.json") + 1 :], "want zeros after"),
        (lambda t: t[:-1] + b"\1", "want the archive's end, found the end of the archive"),
        (lambda t: t[:-1024] + tar_of({})[:512] + bytes(512), "want the archive's end, found a file 'archive.json'"),
        (lambda t: t + bytes(512), "there is something in it that is not listed"),
        (lambda t: t[:-512], "something is missing"),
        (lambda t: t[512:], "want archive.json first, as llava-deploy pack writes it, found bytes that are"),
        (
            lambda t: t[t.index(b"manifest.json\0") :],
            "want archive.json first, as llava-deploy pack writes it, found a",
        ),
        (lambda t: with_header(t, "archive.json", kind=b"2"), "want archive.json first"),
        (lambda t: b"archive.json".ljust(t.index(b"manifest.json\0"), b"\0"), "want archive.json first"),
    ],
)
def test_holes_and_ends(change: Bytes, message: str, archive: Path, refused: Callable[[bytes], str]) -> None:
    assert message in refused(framed(change(tar_in(archive.read_bytes()))))


Members = dict[str, bytes]


def edited(members: Members, **changes: object) -> Members:
    """Other fields in the manifest."""
    manifest = {**json.loads(members[MANIFEST_NAME]), **changes}
    return {**members, MANIFEST_NAME: json.dumps(manifest).encode()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "zz.py": b"import os"}, "holds 'zz.py', which manifest.json does not list"),
        (
            lambda m: {p: c for p, c in m.items() if p != "vision.onnx"},
            "lacks 'vision.onnx', which manifest.json lists",
        ),
        (lambda m: {**m, "vision.onnx": b"x"}, "holds 'vision.onnx' of another size or sha256"),
        (lambda m: {p: c for p, c in m.items() if p != MANIFEST_NAME}, "want manifest.json first"),
        (lambda m: dict(reversed(m.items())), "want manifest.json first"),
        (lambda m: {**m, "archive.json/x": b""}, "archive.json/x"),
        (lambda m: {**m, "vision.onnx.data/x": b""}, "'vision.onnx.data' cannot be a file of a bundle"),
        (lambda m: {**m, "../zz": b""}, "leaves the bundle"),
        (lambda m: {**m, "/zz": b""}, "leaves the bundle"),
        (lambda m: {**m, "z\\z": b""}, "leaves the bundle"),
        (lambda m: {**m, "z/./z": b""}, "want a plain relative path"),
        (lambda m: {**m, "zz\n": b""}, "want a plain relative path"),
        (lambda m: {**m, "z" * 256: b""}, "is too long to be unpacked"),
        (lambda m: {**m, "z/" * 600 + "z": b""}, "is too long to be unpacked"),
        (lambda m: edited(m, format_version=3), "model.lvd, manifest.json: want format_version 2, found 3"),
        (lambda m: edited(m, files={}), "model.lvd, manifest.json: manifest.files: want"),
        (lambda m: {**m, MANIFEST_NAME: b"{"}, "model.lvd, manifest.json: not JSON"),
        (lambda m: {**m, MANIFEST_NAME: b" " * ((4 << 20) + 1)}, "want at most 4,194,304 bytes of 'manifest.json'"),
        (lambda m: {p: c for p, c in m.items() if p != f"engines/{ENGINE}/engine.json"}, "lacks 'engines/"),
        (lambda m: {p: c for p, c in m.items() if p != f"engines/{ENGINE}/vision.onnx"}, "lacks 'engines/"),
        (lambda m: {**m, f"engines/{ENGINE}/zz": b""}, "engine.json does not list"),
        (lambda m: {**m, f"engines/{ENGINE}/engine.json": b"{"}, "engine.json: cannot be read"),
        (lambda m: {**m, "engines/zz": b""}, "'engines/zz' is of no engine"),
        (lambda m: {**m, "engines/zz/yy": b""}, "lacks 'engines/zz/engine.json'"),
    ],
)
def test_members_and_manifests_that_do_not_agree(
    change: Callable[[Members], Members], message: str, archive: Path, refused: Callable[[bytes], str]
) -> None:
    members = change(members_of(tar_in(archive.read_bytes())))
    first = [path for path in members if path == MANIFEST_NAME]
    in_order = {path: members[path] for path in [*first, *sorted(members.keys() - {MANIFEST_NAME})]}
    given = members if "first" in message else in_order
    assert message in refused(framed(tar_of(given)))


def relisted(archive: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    """The archive with another listing, of the form that pack writes."""
    members = members_of(tar_in(archive))
    data = json.loads(listing_for(members).to_bytes())
    edit(data)
    return framed(tar_of(members, (json.dumps(data, indent=1) + "\n").encode()))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(format_version=2), "archive.json: want format_version 1, found 2"),
        (lambda d: d.update(format_version=True), "archive.format_version: want <class 'int'>, found True"),
        (lambda d: d.update(kind="a rocket"), "archive.kind: want"),
        (lambda d: d.update(more=1), "unknown ['more']"),
        (lambda d: d.pop("members"), "missing ['members']"),
        (lambda d: d.update(model="GPT"), "says that it is 'GPT' in 'fp32' with engines"),
        (lambda d: d.update(precision="int4"), "says that it is 'tiny' in 'int4'"),
        (lambda d: d.update(engines=[]), "with engines []"),
        (lambda d: d["members"][1].update(size=-512), "want a size and a sha256 of"),
        (lambda d: d["members"][1].update(sha256="A" * 64), "want a size and a sha256 of"),
        (lambda d: d["members"][1].update(size=1 << 70), "something is missing"),
        (lambda d: d["members"][1].update(size=10**4000), "something is missing"),
        (lambda d: d["members"].append(dict(d["members"][-1])), "stands twice"),
        (lambda d: d["members"].pop(), "there is something in it that is not listed"),
        (lambda d: d["members"].append({"path": "../z", "size": 0, "sha256": "0" * 64}), "leaves the bundle"),
        (lambda d: d.update(members=[]), "want manifest.json first"),
    ],
)
def test_listings(
    edit: Callable[[dict[str, Any]], object], message: str, archive: Path, refused: Callable[[bytes], str]
) -> None:
    assert message in refused(relisted(archive.read_bytes(), edit))


def test_a_listing_of_the_right_meaning_but_other_bytes(archive: Path, refused: Callable[[bytes], str]) -> None:
    """Twice the same key, or another space: two readers could read two things in it."""
    members = members_of(tar_in(archive.read_bytes()))
    listing = listing_for(members).to_bytes()
    for other in (listing + b" ", listing.replace(b"{\n", b'{\n "model": "GPT",\n', 1)):
        assert "want the text that llava-deploy writes of this listing" in refused(framed(tar_of(members, other)))


def test_a_listing_without_end(refused: Callable[[bytes], str]) -> None:
    tar = tar_of({}, b"[" * ((4 << 20) + 1))
    assert "want at most 4,194,304 bytes of archive.json" in refused(framed(tar))
    assert "not JSON" in refused(framed(tar_of({}, b"[" * (3 << 20))))
    assert "want at most" in refused(framed(tar_of({}, b"")))


def test_engines_held_against_their_own_manifest(archive: Path, refused: Callable[[bytes], str]) -> None:
    members = members_of(tar_in(archive.read_bytes()))
    members[f"engines/{ENGINE}/vision.onnx"] = b"poison"
    assert "of another size or sha256 than engines/" in refused(framed(tar_of(members)))


def test_the_helpers_describe_as_pack_does() -> None:
    content = b"{}"
    assert entries_of({"x": content}) == (FileEntry("x", 2, hashlib.sha256(content).hexdigest()),)
    assert manifest_of(()).files == ()
    assert zstandard.get_frame_parameters(framed(b"x" * 100)).content_size == 100

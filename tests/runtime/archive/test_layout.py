from __future__ import annotations

import io
import tarfile

import pytest

from llava_deploy.engines.manifest import FileEntry
from llava_deploy.runtime.archive.layout import (
    END,
    describe_header,
    length_of,
    member_header,
    padded,
    size_in_header,
)

LONG = "goldens/" + "n" * 120 + "/logits.npy"


@pytest.mark.parametrize("path", ["a", "engines/x/decoder.onnx", "n" * 100, LONG, "goldens/größe 1/é.npy", "y" * 990])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_tarfile_reads_what_stands_there(path: str, size: int) -> None:
    content = bytes(size)
    tar = member_header(path, size) + padded(content) + END
    assert len(tar) % 512 == 0
    assert len(tar) == length_of([FileEntry(path, size, "")]) + len(END)
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        (member,) = opened.getmembers()
        assert (member.name, member.size, member.mode, member.mtime) == (path, size, 0o644, 0)
        assert (member.uid, member.gid, member.uname, member.gname, member.isreg()) == (0, 0, "", "", True)


@pytest.mark.parametrize("size", [8**11 - 1, 8**11, 13_476_000_000, 2**63])
def test_sizes_beyond_eight_gigabytes(size: int) -> None:
    header = member_header("decoder.onnx.data", size)
    assert len(header) == (512 if size < 8**11 else 1536)
    with tarfile.open(fileobj=io.BytesIO(header)) as opened:
        member = opened.next()
    assert member is not None
    assert (member.name, member.size) == ("decoder.onnx.data", size)


def test_the_bytes_of_a_header() -> None:
    """Written down, so that another version does not quietly write another archive."""
    want = b"archive.json".ljust(100, b"\0") + b"0000644\x000000000\x000000000\x0000000000017\x0000000000000\0"
    want += b"011517\0 0".ljust(109, b"\0") + b"ustar\x0000" + bytes(64) + b"0000000\x000000000\0" + bytes(167)
    assert member_header("archive.json", 15) == want
    assert size_in_header(want) == 15


@pytest.mark.parametrize("field", [b"00000000008", b"-0000000001", b" 0000000001", b"0" * 10 + b"\0", b"\x80" * 11])
def test_a_size_is_eleven_octal_digits(field: bytes) -> None:
    block = member_header("archive.json", 15)
    assert size_in_header(block[:124] + field + block[135:]) is None


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (bytes(512), "the end of the archive"),
        (member_header("x", 7), "a file 'x' of 7 bytes"),
        (member_header("x", 7)[:156] + b"5" + bytes(100) + member_header("x", 7)[257:], "a directory 'x'"),
        (member_header(LONG, 7)[:512], "an extended header 'extended'"),
        (b"PK\x03\x04".ljust(512, b"\1"), "bytes that are no header, b'PK\\x03\\x04"),
    ],
)
def test_what_stands_there_in_words(block: bytes, found: str) -> None:
    assert describe_header(block).startswith(found)

"""How members lie in an archive: what stands before, between and after them, byte for byte.

The form is POSIX.1-2001's (pax): a ustar header, and before it an extended header where a path or a size does not fit
into one. Nothing in it depends on who packs, where or when, so that a reader can say what each byte has to be.
Source: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable

from llava_deploy.engines.manifest import FileEntry

BLOCK = 512
"""Bytes: everything in a tar begins at a multiple of it."""

END = bytes(2 * BLOCK)
"""What stands after the last member, and nothing behind it."""

_LONGEST_NAME = 100
_LARGEST_SIZE = 8**11 - 1
_FILE, _EXTENDED = b"0", b"x"
_KINDS = {
    b"0": "a file",
    b"\0": "a file",
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a directory",
    b"6": "a pipe",
    b"7": "a file",
    b"g": "a global extended header",
    b"x": "an extended header",
    b"L": "GNU tar's long name",
    b"K": "GNU tar's long link",
    b"S": "a sparse file",
}


def member_header(path: str, size: int) -> bytes:
    """Everything that stands before the content of the file ``path``, of ``size`` bytes: one block, or three or more.

    A regular file of mode 0644 and nobody's, from the beginning of time.
    """
    name = path.encode("utf-8")
    records = b""
    if len(name) > _LONGEST_NAME or not path.isascii():
        records += _record(b"path", name)
    if size > _LARGEST_SIZE:
        records += _record(b"size", b"%d" % size)
    if not records:
        return _block(name, size, _FILE)
    plain = path.encode("ascii", "replace")[:_LONGEST_NAME]  # for readers of before 2001
    stated = size if size <= _LARGEST_SIZE else 0
    return _block(b"extended", len(records), _EXTENDED) + padded(records) + _block(plain, stated, _FILE)


def padding(size: int) -> bytes:
    """The zeros after ``size`` bytes of content."""
    return bytes(-size % BLOCK)


def padded(content: bytes) -> bytes:
    """Content with the zeros after it."""
    return content + padding(len(content))


def size_in_header(block: bytes) -> int | None:
    """The size that a header states, as :func:`member_header` writes it; ``None`` where there is none."""
    field = block[124:135]
    return int(field, 8) if len(field) == 11 and all(byte in b"01234567" for byte in field) else None


def length_of(members: Iterable[FileEntry]) -> int:
    """Bytes of the members with their headers and padding, without the end."""
    return sum(len(member_header(m.path, m.size)) + m.size + len(padding(m.size)) for m in members)


def describe_header(block: bytes) -> str:
    """What stands where a header is wanted, for an error's message: ``a symbolic link 'x' to '/etc'``."""
    if not any(block):
        return "the end of the archive"
    if block[257:262] != b"ustar":
        return f"bytes that are no header, {block[:16]!r} and so on"
    kind = block[156:157]
    name, target = _text(block[:100]), _text(block[157:257])
    where = _text(block[345:500])
    found = f"{_KINDS.get(kind, f'a member of unknown kind {kind!r}')} {f'{where}/{name}' if where else name!r}"
    if kind in b"12":
        return f"{found} to {target!r}"
    if kind in b"\x0007":
        size = size_in_header(block)
        return found if size is None else f"{found} of {size:,} bytes"
    return found


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _record(key: bytes, value: bytes) -> bytes:
    """``LENGTH KEY=VALUE`` and a line's end, where the length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _block(name: bytes, size: int, kind: bytes) -> bytes:
    fields = (
        name.ljust(_LONGEST_NAME, b"\0"),
        b"0000644\0",  # mode
        b"0000000\0" * 2,  # user and group
        b"%011o\0" % size,
        b"00000000000\0",  # time
        b" " * 8,  # the checksum, while it is taken
        kind,
        bytes(100),  # what a link leads to
        b"ustar\x0000",
        bytes(64),  # names of user and group
        b"0000000\0" * 2,  # device
        bytes(155 + 12),  # more of the name, and what is left of the block
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]

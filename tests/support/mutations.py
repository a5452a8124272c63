"""Inputs that are wrong in random places: bytes, and JSON by its structure. And the watch over who reads them."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

LIMIT_S = 20.0
"""Of one input, which takes some milliseconds: room for a machine that is busy with other things."""

_DEEP: Any = []
for _ in range(60):
    _DEEP = [_DEEP]
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**63, 2**64 - 1, -(2**63), 10**400, -(10**400)),
    *(0.0, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 1.5),
    *(
        "",
        "x",
        "\0",
        "\ud800",
        "\udfff\ud800",
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "C:\\x",
        "a\nb",
        "é",
        "\x1b[2J",
    ),
    *("x" * 5000, "x/" * 2000 + "x", "manifest.json", "archive.json", "engines/x/engine.json", "0" * 64, "{{ x }}"),
    *([], {}, [[]], [{}], {"x": []}, _DEEP, ["x"] * 50, {str(i): i for i in range(50)}),
)
TEXTS = (
    *("", " ", "null", "[]", "{}", "0", '"x"', "NaN", "Infinity", "-", "[1,", '{"a"', '{"a":1,"a":2}', "\ufeff{}"),
    *("[" * 100_000, '{"x":' * 50_000, "9" * 100_000, "1e999999999", '"\\ud800"', '"' + "x" * 100_000, "\x00", "{}{}"),
)


def mutated_bytes(numbers: random.Random, data: bytes) -> bytes:
    """One to four edits: bits, bytes, ranges cut, doubled, moved, zeroed or drawn, lengths changed, the end cut off."""
    for _ in range(numbers.choice((1, 1, 1, 2, 4))):
        size = len(data)
        at = numbers.randrange(size + 1)
        to = min(size, at + numbers.choice((1, 2, 3, 4, 8, 16, 100, 512, 513, 1024)))
        other = numbers.randrange(size + 1)
        part = data[at:to]
        kind = numbers.randrange(10)
        if kind <= 1 and part:
            data = data[:at] + bytes([part[0] ^ 1 << numbers.randrange(8)]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + numbers.randbytes(len(part)) + data[to:]
        elif kind == 3:
            data = data[:at] + data[to:]
        elif kind == 4:
            data = data[:at] + part + data[at:]
        elif kind == 5:
            data = data[:other] + part + data[other:]
        elif kind == 6:
            data = data[:other] + part + data[other + len(part) :]
        elif kind == 7:
            data = data[:at] + numbers.choice((b"\0", b"\xff", b"0", b"7", b" ", b"/")) * len(part) + data[to:]
        elif kind == 8:
            number = numbers.choice((0, 1, 0x7F, 0x80, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 44, (1 << 64) - 1))
            data = data[:at] + number.to_bytes(8, numbers.choice(("little", "big"))) + data[at + 8 :]
        else:
            data = data[:at]
    return data


def mutated_json(numbers: random.Random, value: Any) -> bytes:
    """JSON of a value with one to three places changed; at times its text is changed too, or is another."""
    if numbers.random() < 0.02:
        return numbers.choice(TEXTS).encode("utf-8", "surrogatepass")
    value = copy.deepcopy(value)
    for _ in range(numbers.choice((1, 1, 1, 2, 3))):
        value = _changed(numbers, value)
    text = json.dumps(value, indent=numbers.choice((None, 1)), ensure_ascii=numbers.random() < 0.8)
    content = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(numbers, content) if numbers.random() < 0.15 else content


def _changed(numbers: random.Random, value: Any) -> Any:
    """The value with one place in it changed, all places of its tree being equally near to the root."""
    inside = isinstance(value, (dict, list)) and value and numbers.random() < 0.85
    if not inside:
        return copy.deepcopy(numbers.choice(NASTY))
    kind = numbers.randrange(8)
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]
    key, other = numbers.choice(keys), numbers.choice(keys)
    if kind == 0:
        value.pop(key)
    elif kind == 1 and isinstance(value, dict):
        value[numbers.choice(("", "x", "\ud800", "path", "size", "files"))] = copy.deepcopy(numbers.choice(NASTY))
    elif kind == 1:
        value.insert(key, copy.deepcopy(value[other]))
    elif kind == 2:
        value[key] = copy.deepcopy(value[other])
    else:
        value[key] = _changed(numbers, value[key])
    return value


class TooLong(BaseException):
    """An input took longer than :data:`LIMIT_S`; nothing that is being tested catches it."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Ends what takes too long, with :class:`TooLong`."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_memory() -> int:
    """Most bytes that this process has had in memory until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

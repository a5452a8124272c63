"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import ctypes
from pathlib import Path
from llava_deploy.engines.tensorrt.heap import give_back_freed_memory, trim_heap

libc, size, count = ctypes.CDLL(None), 1 << 24, 8
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def block():
    address = libc.malloc(size)
    ctypes.memset(address, 1, size)
    return address

if {told}:
    assert give_back_freed_memory()
libc.free(block())  # glibc takes its size for one that is wanted often
before, blocks = anonymous(), [block() for _ in range(count)]
stays = block()
for address in blocks:
    libc.free(address)
kept = anonymous() - before - size
if {trimmed}:
    trim_heap()
print(kept, anonymous() - before - size, count * size)
"""


def kept(*, told: bool, trimmed: bool) -> tuple[float, float]:
    """Part of the freed memory that is with the process still, before and after the end of the script."""
    script = SCRIPT.format(told=told, trimmed=trimmed)
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    first, last, freed = map(int, done.stdout.split())
    return first / freed, last / freed


def test_blocks_go_back_one_by_one() -> None:
    assert kept(told=False, trimmed=False)[1] > 0.9
    assert kept(told=True, trimmed=False)[1] < 0.1


def test_what_is_kept_is_given_back_when_asked() -> None:
    before, after = kept(told=False, trimmed=True)
    assert before > 0.9
    assert after < 0.1

"""Memory that TensorRT frees while it builds goes back to the system, where glibc hands out memory.

glibc takes large blocks from the system one by one and gives each back when it is freed, until the first of them is
freed: from then on blocks of that size, up to 32 MB, come from its heaps, which keep what is freed as long as anything
behind it is in use. A build frees weights between its profiles and phases; four layers of LLaVA-1.5-7B's decoder in
asymmetric int4, 684 MB, peak at 1.31 GB with this in place of 1.59 GB.
"""

from __future__ import annotations

import ctypes

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # glibc's malloc.h
_BLOCK = 1 << 17  # bytes; what glibc begins with


def give_back_freed_memory() -> bool:
    """Keep glibc from raising its limits, in this process and from now on; whether there is a glibc to tell."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_ARENA_MAX: 1, _MMAP_THRESHOLD: _BLOCK, _TRIM_THRESHOLD: _BLOCK}
    done = [bool(mallopt(name, value)) for name, value in settings.items()]
    return all(done)


def trim_heap() -> None:
    """Give back what is free in the heaps now; nothing where there is no glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

"""Memory of the fake GPU: host memory behind addresses that nobody can read by accident."""

from __future__ import annotations

import bisect
import ctypes

import numpy as np

_FIRST = 1 << 52  # beyond any address of a process: reading it as host memory is a crash, as with a real GPU
_GAP = 1 << 20
ALIGNMENT = 256
GARBAGE = 0xFF
"""What memory holds that nobody has written: NaN in every float."""


class IllegalAddressError(Exception):
    """Memory that was not allocated, or has been freed."""


class Memory:
    """Blocks on the device, and pinned blocks on the host."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self._starts: list[int] = []
        self._next = _FIRST
        self._gone: list[np.ndarray] = []

    def allocate(self, size: int) -> int | None:
        """Address of ``size`` bytes of garbage; ``None`` where there is no room."""
        if self.used + size > self.total:
            return None
        address = self._next
        self._next += -(-size // ALIGNMENT) * ALIGNMENT + _GAP
        self.device[address] = np.full(size, GARBAGE, np.uint8)
        self._starts.append(address)
        self.used += size
        return address

    def free(self, address: int) -> bool:
        if address not in self.device:
            return False
        self.used -= self.device.pop(address).nbytes
        self._starts.remove(address)
        return True

    def pin(self, size: int) -> int:
        block = np.full(size + ALIGNMENT, GARBAGE, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        offset = address - block.ctypes.data
        self.pinned[address] = block[offset : offset + size]
        return address

    def unpin(self, address: int) -> bool:
        if address not in self.pinned:
            return False
        block = self.pinned.pop(address)
        block[:] = GARBAGE  # a late reader finds this, and the process lives on
        self._gone.append(block)
        return True

    @staticmethod
    def is_device(address: int) -> bool:
        return address >= _FIRST

    def is_pinned(self, address: int) -> bool:
        return any(start <= address < start + block.nbytes for start, block in self.pinned.items())

    def view(self, address: int, size: int) -> np.ndarray:
        """The bytes at an address: ``uint8 [size]``.

        Raises:
            IllegalAddressError: they are not inside one block.
        """
        if self.is_device(address):
            index = bisect.bisect_right(self._starts, address) - 1
            if index >= 0:
                start = self._starts[index]
                if address + size <= start + self.device[start].nbytes:
                    return self.device[start][address - start : address - start + size]
            raise IllegalAddressError(f"{size} bytes at {address:#x} of the device")
        for start, block in self.pinned.items():
            if start <= address < start + block.nbytes:
                if address + size > start + block.nbytes:
                    raise IllegalAddressError(f"{size} bytes at {address:#x} of pinned memory")
                return block[address - start : address - start + size]
        if any(block.ctypes.data <= address < block.ctypes.data + block.nbytes for block in self._gone):
            raise IllegalAddressError(f"{address:#x}: pinned memory that was freed")
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)

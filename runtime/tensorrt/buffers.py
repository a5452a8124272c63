"""Buffers of a session: inputs that go up in one copy, logits that come down, the KV cache, blocks that are reused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from llava_deploy.engines.contract import DecoderShape, past_name
from llava_deploy.runtime.tensorrt.cuda import ALIGNMENT, Device, DeviceMemory, PinnedMemory

Fields: TypeAlias = "Mapping[str, tuple[tuple[int, ...], np.dtype]]"
"""Shape and dtype of arrays by name."""


def aligned(size: int) -> int:
    """``size`` bytes, rounded up so that what comes after is aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def fields_size(fields: Fields) -> int:
    """Bytes of arrays one after the other."""
    return sum(aligned(_bytes(*field)) for field in fields.values())


@dataclass(frozen=True)
class Arrays:
    """Arrays at the same offsets in pinned memory and on the GPU.

    Attributes:
        host: to be written.
        addresses: of the same on the GPU.
    """

    host: dict[str, np.ndarray]
    addresses: dict[str, int]
    _device: Device
    _blocks: tuple[PinnedMemory, DeviceMemory]
    _size: int

    def upload(self) -> None:
        """Queue the copy of them all; ``host`` must stay as it is until the stream has got there."""
        pinned, memory = self._blocks
        self._device.upload(memory.address, pinned.address, self._size)


class Staging:
    """Memory that :class:`Arrays` are laid out in; each layout takes the place of the one before."""

    def __init__(self, device: Device, purpose: str) -> None:
        self._device = device
        self._purpose = purpose
        self._blocks: tuple[PinnedMemory, DeviceMemory] | None = None

    def lay_out(self, fields: Fields) -> Arrays:
        """Arrays of these shapes; the memory grows where it has to, and only while nothing queued uses it.

        Raises:
            DeviceMemoryError: there is no room.
        """
        size = fields_size(fields)
        if self._blocks is None or self._blocks[0].size < size:
            self._blocks = None
            self._blocks = (self._device.pin(size, self._purpose), self._device.allocate(size, self._purpose))
        pinned, memory = self._blocks
        host, addresses, at = {}, {}, 0
        for name, (shape, dtype) in fields.items():
            host[name] = pinned.array(at, shape, dtype)
            addresses[name] = memory.address + at
            at += aligned(_bytes(shape, dtype))
        return Arrays(host, addresses, self._device, self._blocks, size)


class Logits:
    """float32 ``[rows, vocab]`` on the GPU and, after :meth:`download` and a wait, on the host."""

    def __init__(self, device: Device, rows: int, vocab: int) -> None:
        self._device = device
        size = rows * vocab * 4
        self._memory = device.allocate(size, "logits")
        self._pinned = device.pin(size, "logits")
        self._host = self._pinned.array(0, (rows, vocab), np.dtype(np.float32))
        self.address = self._memory.address

    def download(self, batch: int) -> np.ndarray:
        """Queue the copy of the first rows; the array that it goes to."""
        found = self._host[:batch]
        self._device.download(self._pinned.address, self.address, found.nbytes)
        return found


class Cache:
    """Keys and values of ``rows`` rows in one block, zeros at first; a smaller batch has the first of its rows.

    Each layer's keys, and values, ``[rows, kv_heads, slots, head_dim]``, lie together. They begin as zeros as a slot
    that the mask hides still meets a weight of 0, and 0 x NaN is NaN.
    """

    def __init__(self, device: Device, shape: DecoderShape, rows: int, slots: int) -> None:
        """Allocate it.

        Raises:
            DeviceMemoryError: there is no room.
        """
        part = aligned(rows * shape.kv_heads * slots * shape.head_dim * np.dtype(shape.dtype).itemsize)
        size = 2 * shape.layers * part
        self._memory = device.allocate(size, f"the KV cache of {rows} x {slots} tokens")
        device.clear(self._memory.address, size)
        names = [past_name(layer, each) for layer in range(shape.layers) for each in ("key", "value")]
        self.addresses = {name: self._memory.address + i * part for i, name in enumerate(names)}
        """By the name of the decoder's input."""


class Pool:
    """Blocks of one size that are used again; right where all that uses them is queued on one stream, in order."""

    def __init__(self, device: Device, size: int, purpose: str) -> None:
        self._device = device
        self._size = size
        self._purpose = purpose
        self._free: list[DeviceMemory] = []

    def take(self) -> DeviceMemory:
        """A block.

        Raises:
            DeviceMemoryError: there is no room for another.
        """
        return self._free.pop() if self._free else self._device.allocate(self._size, self._purpose)

    def put(self, block: DeviceMemory) -> None:
        """Give a block back; what is queued already may still use it."""
        self._free.append(block)


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

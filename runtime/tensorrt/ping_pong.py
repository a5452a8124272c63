"""A cache that grows, on the device: two halves, of which one is read while the other is written."""

from __future__ import annotations

import numpy as np

from llava_deploy.engines.contract import DecoderShape, past_name, present_name
from llava_deploy.runtime.cache_map import Packing
from llava_deploy.runtime.tensorrt.buffers import aligned
from llava_deploy.runtime.tensorrt.cuda import Device


class PingPong:
    """Keys and values of all layers, ``[batch, kv_heads, past_len, head_dim]`` each, packed at the start of its buffer.

    A step reads one half and writes the whole cache, with its new tokens, to the other; then they change places. So
    both take as much as the longest cache. All that is in the past was written, or is zero: what the mask hides still
    meets a weight of 0, and 0 x NaN is NaN.
    """

    def __init__(self, device: Device, shape: DecoderShape, batch: int, places: int) -> None:
        """Allocate both halves for rows of so many places: one more than there are slots.

        Raises:
            DeviceMemoryError: no room.
        """
        self._device = device
        self._rows = batch * shape.kv_heads
        self._heads = shape.kv_heads
        self._place = shape.head_dim * np.dtype(shape.dtype).itemsize  # bytes of one head at one place
        self._parts = [(layer, part) for layer in range(shape.layers) for part in ("key", "value")]
        self._stride = aligned(self._rows * places * self._place)
        purpose = f"the KV cache of {batch} x {places - 1} tokens, twice, as it grows from one into the other"
        half = len(self._parts) * self._stride
        self._memory = device.allocate(2 * half, purpose)
        self._halves = [self._memory.address, self._memory.address + half]
        self.empty()

    def bindings(self) -> dict[str, int]:
        """Addresses for a step, by the names of the decoder's inputs and outputs."""
        past, present = (self._addresses(index) for index in range(2))
        names = {past_name(*part): address for part, address in zip(self._parts, past, strict=True)}
        return names | {present_name(*part): address for part, address in zip(self._parts, present, strict=True)}

    def empty(self) -> None:
        """Have a past of one place, of zeros."""
        for address in self._addresses(0):
            self._device.clear(address, self._rows * self._place)

    def swap(self) -> None:
        """A step was run: what it wrote is what the next one reads."""
        self._halves.reverse()

    def pack(self, packing: Packing) -> None:
        """Queue the moves; what no run fills is zero."""
        before, after = (length * self._place for length in packing.past_len)  # bytes of one head
        if not packing.runs:
            self.empty()
            return
        for source, target in zip(self._addresses(0), self._addresses(1), strict=True):
            self._device.clear(target, self._rows * after)
            for run in packing.runs:
                row = run.row * self._heads
                self._device.copy_rows(
                    (target + row * after + run.target * self._place, after),
                    (source + row * before + run.source * self._place, before),
                    (self._heads, run.count * self._place),
                )
        self.swap()

    def _addresses(self, half: int) -> list[int]:
        return [self._halves[half] + index * self._stride for index in range(len(self._parts))]

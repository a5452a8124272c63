"""Decode steps of fixed shapes, replayed as CUDA graphs: one for each batch and bucket of visible slots."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.tensorrt.buffers import Arrays, Logits
from llava_deploy.runtime.tensorrt.cuda import Device, DeviceMemoryError, Graph
from llava_deploy.runtime.tensorrt.parts import PartContexts

STEPS_KEPT = 32
"""Shapes whose contexts and graphs are kept; the one used longest ago goes first."""

_LEAST = 64  # slots


def bucket(total: int, most: int) -> int:
    """Visible slots that a step for ``total`` is run with: fewer than :data:`_LEAST`, or than a quarter, more.

    Buckets are an eighth of the next power of two apart, so that there are some twenty up to 4,096 slots.
    """
    apart = max(_LEAST, (1 << (total - 1).bit_length()) >> 3)
    return min(-(-total // apart) * apart, most)


class Step:
    """One shape of decode step.

    Contexts of its own go with each: a captured graph belongs to the shapes that its contexts had, and one that is
    given others would spoil it.
    """

    def __init__(self, device: Device, contexts: PartContexts, arrays: Arrays, logits: Logits, batch: int) -> None:
        self.arrays = arrays
        """To be filled before :meth:`run`."""
        self._device = device
        self._contexts = contexts
        self._logits = logits
        self._batch = batch
        self._graph: Graph | None = None
        self._found = np.empty((0, 0), np.float32)

    def run(self) -> np.ndarray:
        """Queue the step and wait: float32 ``[batch, vocab]``."""
        if self._graph is None:
            self._queue()
        else:
            self._graph.launch()
        self._device.synchronize()
        return self._found

    def capture(self) -> None:
        """From the next run on, replay; :meth:`run` must have been called, as TensorRT settles in a first run."""
        if self._graph is None:
            self._graph = self._device.capture(self._queue)

    def _queue(self) -> None:
        self.arrays.upload()
        self._contexts.run()
        self._found = self._logits.download(self._batch)


class Steps:
    """The steps of a decoder by shape, made when they are wanted."""

    def __init__(self, make: Callable[[int, int], Step]) -> None:
        self._make = make
        self._steps: OrderedDict[tuple[int, int], Step] = OrderedDict()

    def clear(self) -> None:
        """Forget them: what they are bound to goes."""
        self._steps.clear()

    def get(self, batch: int, total: int) -> Step:
        """The step for a batch and a bucket of slots.

        Raises:
            DeviceMemoryError: no room for another, even after all others have gone.
            BackendError: TensorRT refuses.
        """
        key = (batch, total)
        if key not in self._steps:
            while len(self._steps) >= STEPS_KEPT:
                self._steps.popitem(last=False)
            try:
                self._steps[key] = self._make(batch, total)
            except DeviceMemoryError:
                if not self._steps:
                    raise
                self._steps.clear()
                self._steps[key] = self._make(batch, total)
        self._steps.move_to_end(key)
        return self._steps[key]


def capture_or_warn(step: Step) -> bool:
    """Capture a step; where it cannot be, say so and go on without.

    Returns:
        Whether other steps should be captured.
    """
    try:
        step.capture()
    except BackendError as error:
        warnings.warn(f"decoding goes on without CUDA graphs, which is slower: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True

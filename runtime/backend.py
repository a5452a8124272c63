"""What a backend gives to the runtime: two sessions over the two graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np


class DeviceFeatures(Protocol):
    """Features of one picture, ``[patches, hidden]``, in the memory of the device that encoded it."""

    def numpy(self) -> np.ndarray:
        """A copy on the host, in the graph's dtype; waits for the device."""


ImageFeatures: TypeAlias = "np.ndarray | DeviceFeatures"
"""Of one picture, ``[patches, hidden]``."""


@dataclass(frozen=True)
class Placement:
    """Where rows of a picture's features on the device go in ``inputs_embeds``, which holds zeros there.

    Attributes:
        row: of the batch.
        at: the first token of ``seq`` that they are put in the place of.
        features: of the picture.
        first: the first of its rows, and so many of them.
    """

    row: int
    at: int
    features: DeviceFeatures
    first: int
    count: int


class VisionSession(Protocol):
    """The vision graph, loaded."""

    max_images: int
    """Pictures that one call takes: bounds its activations, whatever the number of pictures."""

    def encode(self, pixel_values: np.ndarray) -> Sequence[ImageFeatures] | np.ndarray:
        """``[images, 3, height, width]`` to image features ``[images, patches, hidden]``.

        Any float dtype comes in; the features are in the graph's. They may stay on the device, a
        :class:`DeviceFeatures` a picture.
        """

    def clock(self) -> Callable[[], float] | None:
        """What tells the seconds that the device took for the last :meth:`encode`; ``None`` where that had waited.

        To be asked when a step of the decoder is over: before that it waits for the device.
        """


class DecoderSession(Protocol):
    """The decoder graph, loaded, with its cache."""

    max_len: int
    """Slots of the cache: no row's context grows past it."""

    max_seq: int
    """New tokens of a row that one step takes."""

    run_seconds: float
    """Of all steps so far, spent in the backend, waits for it included; the rest of a step is Python's."""

    def begin(self, batch: int) -> None:
        """Have a cache for ``batch`` rows; the contents of one that is kept from before stay valid.

        Raises:
            OptionError: more rows than the backend takes at once.
            BackendError: no memory for it.
        """

    def clear(self) -> None:
        """Forget what the cache holds, after a failure; to be followed by :meth:`begin`.

        What the mask hides still meets a weight of 0, and 0 x NaN is NaN.
        """

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement] = (),
    ) -> np.ndarray:
        """Write new tokens into the cache and give the logits after one of them for each row.

        Args:
            inputs_embeds: ``[batch, seq, hidden]`` in the graph's dtype.
            write_indices: int64 ``[batch]``: the slot, and the position, of each row's first new token.
            last_index: int64 ``[batch]``: the new token of each row whose logits are wanted.
            pictures: features that are on the device already, put into ``inputs_embeds`` there.

        Returns:
            float32 ``[batch, vocab]``; valid until the next call.
        """


def step_mask(write_indices: np.ndarray, seq: int, total: int | None = None) -> np.ndarray:
    """Bool ``[batch, 1, seq, total]``: token ``j`` of a row sees the slots up to its own, ``write_indices + j``.

    ``total`` is as many as the row that is furthest has, or more.
    """
    positions = step_positions(write_indices, seq)
    slots = int(write_indices.max()) + seq if total is None else total
    return np.arange(slots) <= positions[:, None, :, None]


def step_positions(write_indices: np.ndarray, seq: int) -> np.ndarray:
    """int64 ``[batch, seq]``: position ids of the new tokens; a token's position is its slot."""
    return write_indices[:, None] + np.arange(seq)

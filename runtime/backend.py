"""What a backend gives to the runtime: two sessions over the two graphs."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class VisionSession(Protocol):
    """The vision graph, loaded."""

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """``[images, 3, height, width]`` to image features ``[images, patches, hidden]``, both in the graph's dtype."""


class DecoderSession(Protocol):
    """The decoder graph, loaded, with its cache."""

    max_len: int
    """Slots of the cache: no row's context grows past it."""

    def begin(self, batch: int) -> None:
        """Have a cache for ``batch`` rows; the contents of one that is kept from before stay valid."""

    def step(self, inputs_embeds: np.ndarray, write_indices: np.ndarray, last_index: np.ndarray) -> np.ndarray:
        """Write new tokens into the cache and give the logits after one of them for each row.

        Args:
            inputs_embeds: ``[batch, seq, hidden]`` in the graph's dtype.
            write_indices: int64 ``[batch]``: the slot, and the position, of each row's first new token.
            last_index: int64 ``[batch]``: the new token of each row whose logits are wanted.

        Returns:
            float32 ``[batch, vocab]``; valid until the next call.
        """


def step_mask(write_indices: np.ndarray, seq: int) -> np.ndarray:
    """Bool ``[batch, 1, seq, total]``: token ``j`` of a row sees the slots up to its own, ``write_indices + j``."""
    positions = step_positions(write_indices, seq)
    return np.arange(int(write_indices.max()) + seq) <= positions[:, None, :, None]


def step_positions(write_indices: np.ndarray, seq: int) -> np.ndarray:
    """int64 ``[batch, seq]``: position ids of the new tokens; a token's position is its slot."""
    return write_indices[:, None] + np.arange(seq)

"""What a decoder in ONNX Runtime reads beside its cache: bound anew for prompts, once for all for single tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llava_deploy.engines.contract import DecoderShape
from llava_deploy.runtime.backend import Placement, step_mask, step_positions
from llava_deploy.runtime.new_tokens import with_features

if TYPE_CHECKING:
    import onnxruntime

_MASK = "attention_mask"
_MASKS_AHEAD = 64


class TokenFeed:
    """The inputs of steps with one token a row: arrays that are bound once, and written over at every step.

    An ``OrtValue`` is made of an array in 2.5 µs, but in 40 to 100 behind a decode step, which leaves nothing of Python
    in the processor's caches. The mask, where the graph reads one, has a slot more at every step: its values are made
    many steps ahead.
    """

    def __init__(
        self,
        shape: DecoderShape,
        batch: int,
        max_len: int,
        wanted: frozenset[str],
        value: Callable[[np.ndarray], onnxruntime.OrtValue],
    ) -> None:
        self._value = value
        self._max_len = max_len
        self._embeds = np.zeros((batch, 1, shape.hidden_size), shape.dtype)
        self._slots = np.zeros(batch, np.int64)
        self._range = np.arange(max_len)
        self._mask = np.ones(batch * max_len, bool)
        self._masks: list[onnxruntime.OrtValue] = []
        self._first_total = 0
        self._has_mask = _MASK in wanted
        arrays = {
            "inputs_embeds": self._embeds,
            "position_ids": self._slots[:, None],  # a token's position is its slot
            "write_indices": self._slots,
            "last_index": np.zeros(batch, np.int64),
        }
        self._fixed = {name: value(array) for name, array in arrays.items() if name in wanted}
        self._bound = False
        self._size, self._dtype = self._embeds.shape, self._embeds.dtype

    def takes(self, inputs_embeds: np.ndarray) -> bool:
        """Whether these are of single tokens; those of another size or dtype than the graph's are its to refuse."""
        return inputs_embeds.shape == self._size and inputs_embeds.dtype == self._dtype

    def release(self) -> None:
        """Other values were bound in the place of these."""
        self._bound = False

    def bind(self, binding: onnxruntime.IOBinding, inputs_embeds: np.ndarray, write_indices: np.ndarray) -> None:
        """Set the inputs of a step: ``[batch, 1, hidden]``, and the slots below ``max_len`` that they go to."""
        if not self._bound:
            for name, value in self._fixed.items():
                binding.bind_ortvalue_input(name, value)
            self._bound = True
        self._embeds[...] = inputs_embeds
        self._slots[...] = write_indices
        if not self._has_mask:
            return
        # A slot beyond the cache is the graph's to refuse.
        batch, total = len(self._slots), min(max(write_indices.tolist()) + 1, self._max_len)
        if batch > 1:  # a row alone sees all the slots there are
            mask = self._mask[: batch * total].reshape(batch, total)
            np.less_equal(self._range[:total], self._slots[:, None], out=mask)
        binding.bind_ortvalue_input(_MASK, self._mask_value(total))

    def _mask_value(self, total: int) -> onnxruntime.OrtValue:
        """Bool ``[batch, 1, 1, total]`` over the mask's memory."""
        if not 0 <= total - self._first_total < len(self._masks):
            batch, last = len(self._slots), min(total + _MASKS_AHEAD, self._max_len + 1)
            self._first_total = total
            self._masks = [
                self._value(self._mask[: batch * slots].reshape(batch, 1, 1, slots)) for slots in range(total, last)
            ]
        return self._masks[total - self._first_total]


def step_feed(
    inputs_embeds: np.ndarray,
    write_indices: np.ndarray,
    last_index: np.ndarray,
    pictures: Sequence[Placement],
    wanted: frozenset[str],
) -> dict[str, np.ndarray]:
    """The ``wanted`` inputs beside the cache; arguments as :meth:`DecoderSession.step` has them."""
    seq = inputs_embeds.shape[1]
    feed = {"inputs_embeds": with_features(inputs_embeds, pictures), "last_index": last_index}
    feed["write_indices"] = write_indices
    if "position_ids" in wanted:
        feed["position_ids"] = step_positions(write_indices, seq)
    if _MASK in wanted:
        feed[_MASK] = step_mask(write_indices, seq)
    return feed

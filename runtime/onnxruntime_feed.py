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
    """The inputs of steps with one token a row: bound once, as long as the caller fills the same arrays anew.

    An ``OrtValue`` is made of an array in 2.5 µs, but in 40 to 100 behind a decode step, which leaves nothing of Python
    in the processor's caches; a copy into an array that is bound takes 12. The mask, where the graph reads one, has a
    slot more at every step: its values are made many steps ahead.
    """

    def __init__(
        self,
        shape: DecoderShape,
        batch: int,
        max_len: int,
        wanted: frozenset[str],
        value: Callable[[np.ndarray], onnxruntime.OrtValue],
    ) -> None:
        self._size = (batch, 1, shape.hidden_size)
        self._wanted = wanted
        self._value = value
        self._max_len = max_len
        self._last_index = np.zeros(batch, np.int64)
        self._embeds: np.ndarray | None = None
        self._slots: np.ndarray | None = None
        self._fixed: dict[str, onnxruntime.OrtValue] = {}
        self._bound = False
        self._range = np.arange(max_len)
        self._mask = np.ones(batch * max_len, bool)
        self._masks: list[onnxruntime.OrtValue] = []
        self._first_total = 0
        self._has_mask = _MASK in wanted

    def takes(self, inputs_embeds: np.ndarray, write_indices: np.ndarray) -> bool:
        """Whether these are of single tokens, and can be bound as they lie."""
        if inputs_embeds is self._embeds and write_indices is self._slots:
            return True
        contiguous = inputs_embeds.flags.c_contiguous and write_indices.flags.c_contiguous
        return contiguous and inputs_embeds.shape == self._size

    def release(self) -> None:
        """Other values were bound in the place of these."""
        self._bound = False

    def bind(self, binding: onnxruntime.IOBinding, inputs_embeds: np.ndarray, write_indices: np.ndarray) -> None:
        """Set the inputs of a step: ``[batch, 1, hidden]``, and the slots below ``max_len`` that they go to."""
        if inputs_embeds is not self._embeds or write_indices is not self._slots:
            self._take_up(inputs_embeds, write_indices)
        if not self._bound:
            for name, value in self._fixed.items():
                binding.bind_ortvalue_input(name, value)
            self._bound = True
        if self._has_mask:
            binding.bind_ortvalue_input(_MASK, self._mask_value(write_indices))

    def _take_up(self, inputs_embeds: np.ndarray, write_indices: np.ndarray) -> None:
        """Other arrays than before; held, as an ``OrtValue`` does not own the memory that it is made over."""
        self._embeds, self._slots = inputs_embeds, write_indices
        arrays = {
            "inputs_embeds": inputs_embeds,
            "position_ids": write_indices[:, None],  # a token's position is its slot
            "write_indices": write_indices,
            "last_index": self._last_index,
        }
        self._fixed = {name: self._value(array) for name, array in arrays.items() if name in self._wanted}
        self._bound = False

    def _mask_value(self, write_indices: np.ndarray) -> onnxruntime.OrtValue:
        """Bool ``[batch, 1, 1, total]`` over the mask's memory."""
        # A slot beyond the cache is the graph's to refuse.
        batch, total = len(write_indices), min(max(write_indices.tolist()) + 1, self._max_len)
        if batch > 1:  # a row alone sees all the slots there are
            mask = self._mask[: batch * total].reshape(batch, total)
            np.less_equal(self._range[:total], write_indices[:, None], out=mask)
        if not 0 <= total - self._first_total < len(self._masks):
            last = min(total + _MASKS_AHEAD, self._max_len + 1)
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

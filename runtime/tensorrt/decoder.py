"""The decoder through TensorRT, its KV cache written in place."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_deploy.engines.contract import DecoderShape, past_name, present_name
from llava_deploy.engines.errors import ContractError
from llava_deploy.engines.tensorrt_recipe import DECODE_PROFILE, PREFILL_PROFILE
from llava_deploy.runtime.backend import Placement, step_mask, step_positions
from llava_deploy.runtime.tensorrt.buffers import Arrays, Cache, Fields, Logits, Staging
from llava_deploy.runtime.tensorrt.cuda import DeviceMemoryError
from llava_deploy.runtime.tensorrt.engine import Engine, Replay
from llava_deploy.runtime.tensorrt.feeding import check_step, place_pictures, require_batch, require_fit, step_fields
from llava_deploy.runtime.tensorrt.graphs import Step, Steps, bucket, capture_or_warn
from llava_deploy.runtime.tensorrt.parts import DecoderParts, HiddenStates, PartContexts


@dataclass(frozen=True)
class _Held:
    """What belongs to a number of rows."""

    rows: int
    cache: Cache
    hidden: HiddenStates
    logits: Logits


class TensorRtDecoder:
    """The decoder graph on the GPU, in one part or several; see :class:`DecoderSession`.

    The cache is allocated for the largest batch so far, a smaller one has the first rows of it, and each of its buffers
    is bound as past and as present. A step of one token a row is run with the mask padded to a bucket of slots, from
    the second time on as a CUDA graph: the copy of the inputs up, the engines, the copy of the logits down. The host
    waits once a step.
    """

    def __init__(self, engines: Sequence[Engine], shape: DecoderShape, max_len: int) -> None:
        """Have a context for prompts; the cache comes with :meth:`begin`.

        Args:
            engines: of a decoder whose cache is written in place, in the order of their layers.
            shape: of the decoder.
            max_len: slots of the cache that are used, of those that the engines have.

        Raises:
            OptionError: ``max_len`` is more than the engines were built for.
            DeviceMemoryError: there is no room.
            BackendError: TensorRT refuses.
        """
        engine = engines[0]
        limits = require_fit(engine, "in-place", max_len)
        self.max_len = max_len
        self.max_seq = min(limits.max_seq, max_len)
        self.run_seconds = 0.0
        self._limits = limits
        self._engines = DecoderParts(engines, shape.spec(limits.max_batch), shape)
        self._parts = engine.recipe.parts
        self._device = engine.device
        self._shape = shape
        self._prefill = self._engines.context(PREFILL_PROFILE, Replay.NEVER)
        self._prompts = Staging(engine.device, "a prompt's embeddings")
        self._tokens = Staging(engine.device, "a step's embeddings")
        self._steps = Steps(self._make_step)
        self._captures = not engine.replays
        self._held: _Held | None = None
        self._batch = 0

    def begin(self, batch: int) -> None:
        """Have a cache for ``batch`` rows; see :class:`DecoderSession`."""
        require_batch(batch, self._limits)
        self._batch = batch
        if self._held is not None and batch <= self._held.rows:
            return
        self._steps.clear()
        self._held = None  # the old buffers go before new ones come
        device, most = self._device, self._limits.max_len
        try:
            self._tokens.lay_out(self._fields(batch, 1, most))  # at its largest: the steps' graphs use it as it is
            self._held = _Held(
                batch,
                Cache(device, self._shape, batch, most),
                HiddenStates(device, self._shape, self._parts, batch * self.max_seq),
                Logits(device, batch, self._shape.vocab_size),
            )
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"{error}; give fewer prompts at once, or build the engine with a smaller --max-len"
            ) from error
        self._bind_held(self._prefill, self._held)

    def clear(self) -> None:
        """Forget what the cache holds; see :class:`DecoderSession`."""
        self._batch = 0
        self._steps.clear()
        self._held = None

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement] = (),
    ) -> np.ndarray:
        """Run the decoder over new tokens; see :class:`DecoderSession`."""
        held = self._checked(inputs_embeds, write_indices)
        batch, seq, _ = inputs_embeds.shape
        total = int(write_indices.max()) + seq
        if seq > 1 or pictures:
            return self._read(held, inputs_embeds, write_indices, last_index, pictures)
        step = self._steps.get(batch, bucket(total, self._limits.max_len))
        self._fill(step.arrays, inputs_embeds, write_indices, last_index)
        began = time.perf_counter()
        logits = step.run()
        self.run_seconds += time.perf_counter() - began
        if self._captures:
            self._captures = capture_or_warn(step)
        return logits

    def _read(
        self,
        held: _Held,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement],
    ) -> np.ndarray:
        """Run prompts, or a piece of them, with pictures that may lie on the GPU."""
        batch, seq, _ = inputs_embeds.shape
        arrays = self._prompts.lay_out(self._fields(batch, seq, int(write_indices.max()) + seq))
        self._fill(arrays, inputs_embeds, write_indices, last_index)
        place_pictures(self._device, arrays, pictures)
        self._bind_inputs(self._prefill, arrays, held)
        began = time.perf_counter()
        self._prefill.run()
        logits = held.logits.download(batch)
        self._device.synchronize()
        self.run_seconds += time.perf_counter() - began
        return logits

    def _make_step(self, batch: int, total: int) -> Step:
        held = self._require_held()
        context = self._engines.context(DECODE_PROFILE, Replay.BY_TENSORRT)
        arrays = self._tokens.lay_out(self._fields(batch, 1, total))
        self._bind_held(context, held)
        self._bind_inputs(context, arrays, held)
        return Step(self._device, context, arrays, held.logits, batch)

    def _fields(self, batch: int, seq: int, total: int) -> Fields:
        return {"write_indices": ((batch,), np.dtype(np.int64)), **step_fields(self._shape, batch, seq, total)}

    def _fill(
        self, arrays: Arrays, inputs_embeds: np.ndarray, write_indices: np.ndarray, last_index: np.ndarray
    ) -> None:
        host, seq = arrays.host, inputs_embeds.shape[1]
        host["inputs_embeds"][:] = inputs_embeds
        host["position_ids"][:] = step_positions(write_indices, seq)
        host["write_indices"][:] = write_indices
        host["last_index"][:] = last_index
        mask = host["attention_mask"]
        mask[:] = step_mask(write_indices, seq, mask.shape[3])

    def _bind_inputs(self, contexts: PartContexts, arrays: Arrays, held: _Held) -> None:
        """Give contexts their inputs, and the batch's part of the cache."""
        for name, address in arrays.addresses.items():
            contexts.reshape(name, arrays.host[name].shape)
            contexts.bind(name, address)
        for name in held.hidden.addresses:
            contexts.reshape(name, arrays.host["inputs_embeds"].shape)
        shape = (self._batch, self._shape.kv_heads, self._limits.max_len, self._shape.head_dim)
        for name in held.cache.addresses:
            contexts.reshape(name, shape)

    def _bind_held(self, contexts: PartContexts, held: _Held) -> None:
        for layer in range(self._shape.layers):
            for part in ("key", "value"):
                address = held.cache.addresses[past_name(layer, part)]
                contexts.bind(past_name(layer, part), address)
                contexts.bind(present_name(layer, part), address)
        for name, address in held.hidden.addresses.items():
            contexts.bind(name, address)
        contexts.bind("logits", held.logits.address)

    def _require_held(self) -> _Held:
        if self._held is None:
            raise ContractError("decoder: want begin() before step()")
        return self._held

    def _checked(self, inputs_embeds: np.ndarray, write_indices: np.ndarray) -> _Held:
        held = self._require_held()
        check_step(inputs_embeds, self._batch, self._shape, self.max_seq)
        last = int(write_indices.max()) + inputs_embeds.shape[1]
        if last > self.max_len:
            raise ContractError(f"write_indices: want tokens up to slot {self.max_len}, got them up to {last}")
        return held

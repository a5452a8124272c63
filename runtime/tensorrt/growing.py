"""The decoder through a TensorRT whose cache only grows: releases without an operator that writes into a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from llava_deploy.engines.contract import DecoderShape, past_name
from llava_deploy.engines.errors import BackendError, ContractError, OptionError
from llava_deploy.engines.tensorrt_recipe import DECODE_PROFILE, PREFILL_PROFILE
from llava_deploy.runtime.backend import Placement, step_positions
from llava_deploy.runtime.cache_map import CacheMap
from llava_deploy.runtime.tensorrt.buffers import Arrays, Fields, Logits, Staging
from llava_deploy.runtime.tensorrt.cuda import DeviceMemoryError
from llava_deploy.runtime.tensorrt.engine import Context, Engine, Replay
from llava_deploy.runtime.tensorrt.feeding import check_step, place_pictures, require_batch
from llava_deploy.runtime.tensorrt.ping_pong import CacheSize, PingPong

_INT64, _BOOL = np.dtype(np.int64), np.dtype(np.bool_)


class GrowingDecoder:
    """The decoder graph on the GPU; see :class:`DecoderSession`.

    A :class:`CacheMap` says which place of the cache holds which slot of which row, and so what the mask lets through.
    Shapes change with every step, so that nothing is replayed as a CUDA graph.
    """

    def __init__(self, engine: Engine, shape: DecoderShape, max_len: int) -> None:
        """Have contexts for prompts and for single tokens; the cache comes with :meth:`begin`.

        Args:
            engine: of a decoder whose cache grows.
            shape: of the decoder.
            max_len: slots of the cache, of those that the engine was built for; memory is taken for these.

        Raises:
            OptionError: ``max_len`` is more than the engine was built for.
            DeviceMemoryError: there is no room.
            BackendError: TensorRT refuses.
        """
        limits = engine.recipe.limits
        if engine.recipe.cache != "growing":
            raise ContractError(f"{engine.name}: want a cache that grows, found {engine.recipe.cache!r}")
        if not 1 <= max_len <= limits.max_len:
            raise OptionError("max_len", f"want 1 to {limits.max_len}, what the engine was built for, got {max_len}")
        self.max_len = max_len
        self.max_seq = min(limits.max_seq, max_len)
        self._limits = limits
        self._device = engine.device
        self._shape = shape
        self._prefill = engine.context(PREFILL_PROFILE, Replay.NEVER)
        self._decode = engine.context(DECODE_PROFILE, Replay.NEVER)
        self._prompts = Staging(engine.device, "a prompt's embeddings")
        self._tokens = Staging(engine.device, "a step's embeddings")
        self._rows = 0
        self._batch = 0

    def begin(self, batch: int) -> None:
        """Have a cache for ``batch`` rows; see :class:`DecoderSession`."""
        require_batch(batch, self._limits)
        if batch == self._batch:
            return
        self._batch = 0
        if batch > self._rows:
            self._allocate(batch)
        self._cache.empty()
        self._map = CacheMap(batch, self.max_len)
        self._batch = batch

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement] = (),
    ) -> np.ndarray:
        """Run the decoder over new tokens; see :class:`DecoderSession`."""
        check_step(inputs_embeds, self._batch, self._shape, self.max_seq)
        try:
            return self._run(inputs_embeds, write_indices, last_index, pictures)
        except BackendError:
            with suppress(BackendError):
                self._device.synchronize()  # what was queued before the failure still uses the buffers
            raise

    def _run(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement],
    ) -> np.ndarray:
        seq = inputs_embeds.shape[1]
        if (packing := self._map.packing(write_indices, seq)) is not None:
            self._cache.pack(packing)
            self._map.packed(packing)
        single = seq == 1 and not pictures
        context, staging = (self._decode, self._tokens) if single else (self._prefill, self._prompts)
        arrays = staging.lay_out(self._fields(self._batch, seq, self._map.past_len + seq))
        arrays.host["inputs_embeds"][:] = inputs_embeds
        arrays.host["position_ids"][:] = step_positions(write_indices, seq)
        arrays.host["attention_mask"][:] = self._map.mask(write_indices, seq)
        arrays.host["last_index"][:] = last_index
        place_pictures(self._device, arrays, pictures)
        self._bind(context, arrays)
        context.run()
        logits = self._logits.download(self._batch)
        self._device.synchronize()
        self._map.written(write_indices, seq)
        self._cache.swap()
        return logits

    def _allocate(self, rows: int) -> None:
        self._rows = 0
        for name in ("_cache", "_logits"):  # the old buffers go before new ones come
            self.__dict__.pop(name, None)
        try:
            self._cache = PingPong(self._device, self._shape, CacheSize(rows, self.max_len + 1))
            self._logits = Logits(self._device, rows, self._shape.vocab_size)
            self._tokens.lay_out(self._fields(rows, 1, self.max_len + 1))  # once, at its largest
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"{error}; give fewer prompts at once, or load the bundle with a smaller max_len (--max-len)"
            ) from error
        self._rows = rows

    def _fields(self, batch: int, seq: int, total: int) -> Fields:
        return {
            "inputs_embeds": ((batch, seq, self._shape.hidden_size), np.dtype(self._shape.dtype)),
            "position_ids": ((batch, seq), _INT64),
            "attention_mask": ((batch, 1, seq, total), _BOOL),
            "last_index": ((batch,), _INT64),
        }

    def _bind(self, context: Context, arrays: Arrays) -> None:
        shape = self._shape
        for name, address in arrays.addresses.items():
            context.reshape(name, arrays.host[name].shape)
            context.bind(name, address)
        past = (self._batch, shape.kv_heads, self._map.past_len, shape.head_dim)
        for layer in range(shape.layers):
            for part in ("key", "value"):
                context.reshape(past_name(layer, part), past)
        for name, address in self._cache.bindings().items():
            context.bind(name, address)
        context.bind("logits", self._logits.address)

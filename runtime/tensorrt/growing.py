"""The decoder through a TensorRT whose cache only grows: releases without an operator that writes into a buffer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_deploy.engines.contract import DecoderShape, past_name
from llava_deploy.engines.errors import ContractError
from llava_deploy.engines.tensorrt_recipe import DECODE_PROFILE, PREFILL_PROFILE
from llava_deploy.runtime.backend import Placement, step_positions
from llava_deploy.runtime.cache_map import CacheMap
from llava_deploy.runtime.tensorrt.buffers import Arrays, Logits, Staging
from llava_deploy.runtime.tensorrt.cuda import DeviceMemoryError
from llava_deploy.runtime.tensorrt.engine import Engine, Replay
from llava_deploy.runtime.tensorrt.feeding import check_step, place_pictures, require_batch, require_fit, step_fields
from llava_deploy.runtime.tensorrt.parts import DecoderParts, HiddenStates, PartContexts
from llava_deploy.runtime.tensorrt.ping_pong import PingPong


@dataclass(frozen=True)
class _Held:
    """What belongs to a number of rows."""

    rows: int
    cache: PingPong
    hidden: HiddenStates
    logits: Logits


class GrowingDecoder:
    """The decoder graph on the GPU, in one part or several; see :class:`DecoderSession`.

    A :class:`CacheMap` says which place of the cache holds which slot of which row, and so what the mask lets through.
    Shapes change with every step, so that nothing is replayed as a CUDA graph.
    """

    def __init__(self, engines: Sequence[Engine], shape: DecoderShape, max_len: int) -> None:
        """Have contexts for prompts and for single tokens; the cache comes with :meth:`begin`.

        Args:
            engines: of a decoder whose cache grows, in the order of their layers.
            shape: of the decoder.
            max_len: slots of the cache, of those that the engines were built for; memory is taken for these.

        Raises:
            OptionError: ``max_len`` is more than the engines were built for.
            DeviceMemoryError: there is no room.
            BackendError: TensorRT refuses.
        """
        engine = engines[0]
        limits = require_fit(engine, "growing", max_len)
        parts = DecoderParts(engines, shape.growing_spec(limits.max_batch), shape)
        self.max_len = max_len
        self.max_seq = min(limits.max_seq, max_len)
        self.run_seconds = 0.0
        self._limits = limits
        self._device = engine.device
        self._shape = shape
        self._parts = engine.recipe.parts
        self._prefill = parts.context(PREFILL_PROFILE, Replay.NEVER)
        self._decode = parts.context(DECODE_PROFILE, Replay.NEVER)
        self._prompts = Staging(engine.device, "a prompt's embeddings")
        self._tokens = Staging(engine.device, "a step's embeddings")
        self._held: _Held | None = None
        self._map: CacheMap | None = None

    def begin(self, batch: int) -> None:
        """Have a cache for ``batch`` rows; see :class:`DecoderSession`."""
        require_batch(batch, self._limits)
        if self._map is not None and batch == self._map.batch:
            return
        self._map = None
        if self._held is None or batch > self._held.rows:
            self._held = None  # the old buffers go before new ones come
            self._held = self._allocate(batch)
        self._held.cache.empty()
        self._map = CacheMap(batch, self.max_len)

    def clear(self) -> None:
        """Forget what the cache holds; see :class:`DecoderSession`."""
        self._map = None

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement] = (),
    ) -> np.ndarray:
        """Run the decoder over new tokens; see :class:`DecoderSession`."""
        if self._held is None or self._map is None:
            raise ContractError("decoder: want begin() before step()")
        check_step(inputs_embeds, self._map.batch, self._shape, self.max_seq)
        logits = self._run(self._held, self._map, (inputs_embeds, write_indices, last_index), pictures)
        self._map.written(write_indices, inputs_embeds.shape[1])
        self._held.cache.swap()
        return logits

    def _run(
        self,
        held: _Held,
        places: CacheMap,
        inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
        pictures: Sequence[Placement],
    ) -> np.ndarray:
        """A step, from packing the cache to the logits; ``inputs`` are those of :meth:`step`."""
        inputs_embeds, write_indices, last_index = inputs
        batch, seq, _ = inputs_embeds.shape
        if (packing := places.packing(write_indices, seq)) is not None:
            held.cache.pack(packing)
            places.packed(packing)
        single = seq == 1 and not pictures
        contexts, staging = (self._decode, self._tokens) if single else (self._prefill, self._prompts)
        arrays = staging.lay_out(step_fields(self._shape, batch, seq, places.past_len + seq))
        arrays.host["inputs_embeds"][:] = inputs_embeds
        arrays.host["position_ids"][:] = step_positions(write_indices, seq)
        arrays.host["attention_mask"][:] = places.mask(write_indices, seq)
        arrays.host["last_index"][:] = last_index
        place_pictures(self._device, arrays, pictures)
        self._bind(contexts, arrays, held, (batch, self._shape.kv_heads, places.past_len, self._shape.head_dim))
        began = time.perf_counter()
        contexts.run()
        logits = held.logits.download(batch)
        self._device.synchronize()
        self.run_seconds += time.perf_counter() - began
        return logits

    def _allocate(self, rows: int) -> _Held:
        device, shape, places = self._device, self._shape, self.max_len + 1
        try:
            held = _Held(
                rows,
                PingPong(device, shape, rows, places),
                HiddenStates(device, shape, self._parts, rows * self.max_seq),
                Logits(device, rows, shape.vocab_size),
            )
            self._tokens.lay_out(step_fields(self._shape, rows, 1, places))  # once, at its largest
        except DeviceMemoryError as error:
            raise DeviceMemoryError(
                f"{error}; give fewer prompts at once, or load the bundle with a smaller max_len (--max-len)"
            ) from error
        return held

    def _bind(self, contexts: PartContexts, arrays: Arrays, held: _Held, past: tuple[int, ...]) -> None:
        for name, address in arrays.addresses.items():
            contexts.reshape(name, arrays.host[name].shape)
            contexts.bind(name, address)
        for name, address in held.cache.bindings().items():
            contexts.bind(name, address)
        for name, address in held.hidden.addresses.items():
            contexts.reshape(name, arrays.host["inputs_embeds"].shape)
            contexts.bind(name, address)
        for layer in range(self._shape.layers):
            for part in ("key", "value"):
                contexts.reshape(past_name(layer, part), past)
        contexts.bind("logits", held.logits.address)

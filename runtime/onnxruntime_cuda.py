"""ONNX Runtime sessions on an NVIDIA GPU: cache, inputs and logits of single tokens stay in its memory.

A step of one token a row is some hundred kernels of a few microseconds each, which take longer to launch one by one
than to run. So the provider captures them as a CUDA graph, once for a number of rows, and replays it: the addresses
that it reads and writes never change (ONNX Runtime, "CUDA Execution Provider", ``enable_cuda_graph``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_deploy.engines.contract import DecoderShape, VisionShape, past_name, present_name
from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.names import PREFILL_TOKENS
from llava_deploy.engines.onnxruntime_cuda import LAST_SLOTS, TOTAL_SLOTS
from llava_deploy.engines.onnxruntime_module import cause
from llava_deploy.runtime.backend import Placement
from llava_deploy.runtime.cuda_provider import CUDA, NO_REPLAY, Provider, Replayed, on_the_host, run_options
from llava_deploy.runtime.new_tokens import with_features

if TYPE_CHECKING:
    import onnxruntime

_IMAGES_AT_ONCE = 4


class OnnxRuntimeCudaVision:
    """The vision graph on the GPU; features come back to the host."""

    max_images = _IMAGES_AT_ONCE

    def __init__(self, model: Path, shape: VisionShape, provider: Provider = CUDA) -> None:
        self._provider, self._shape = provider, shape
        self._spec = shape.spec()
        self._session = provider.open(model)
        self._one: Replayed | None = None

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """``[images, 3, height, width]`` to ``[images, patches, hidden]``; see :class:`VisionSession`."""
        feed = {"pixel_values": pixel_values.astype(self._shape.dtype, copy=False)}
        self._spec.check(feed)
        try:
            if len(pixel_values) == 1:
                return self._encode_one(feed)
            options = run_options(NO_REPLAY)
            features: np.ndarray = self._session.run(["image_features"], feed, options)[0]
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in the vision tower: {cause(error)}") from error
        return features

    def clock(self) -> None:
        """There is nothing that :meth:`encode` has not waited for."""

    def _encode_one(self, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        """One picture, as nearly all prompts have: its kernels are replayed."""
        if self._one is None:
            shape = self._shape
            features = np.zeros((1, shape.patches, shape.hidden_size), shape.dtype)
            inputs = {name: self._provider.value(np.zeros_like(array)) for name, array in feed.items()}
            self._one = Replayed(self._session, inputs, {"image_features": self._provider.value(features)}, 1)
        for name, array in feed.items():
            self._one.inputs[name].update_inplace(np.ascontiguousarray(array))
        self._one.run()
        found: np.ndarray = self._one.outputs["image_features"].numpy().copy()
        return found


class OnnxRuntimeCudaDecoder:
    """The decoder graph on the GPU.

    The cache is allocated for the most rows that were asked for so far, each buffer bound as ``past`` and ``present``;
    fewer rows take its beginning, so the graphs that were captured stay valid. Steps of several tokens run row by row:
    several rows with several tokens each behind a past are what the operator refuses, and one row's tokens fill a GPU.
    """

    def __init__(self, model: Path, shape: DecoderShape, max_len: int, provider: Provider = CUDA) -> None:
        """Load the graph.

        Args:
            model: the decoder of an engine.
            shape: of it.
            max_len: slots of the cache.
            provider: what computes.

        Raises:
            BackendError: see :meth:`Provider.open`.
        """
        self._provider, self._shape = provider, shape
        self._session = provider.open(model)
        self.max_len = max_len
        self.max_seq = min(PREFILL_TOKENS, max_len)
        self.run_seconds = 0.0
        self._cache: dict[tuple[int, str], onnxruntime.OrtValue] = {}
        self._rows = 0  # that the cache has
        self._graphs = 0
        self._batch = 0
        self._forgets = False  # what the cache holds, before it is used again

    def begin(self, batch: int) -> None:
        """Have a cache for ``batch`` rows; see :class:`DecoderSession`."""
        if batch == self._batch:
            return
        self._batch = 0
        if batch > self._rows:
            self._allocate(batch)
        elif self._forgets:
            self._clear_cache()
        self._forgets = False
        if batch not in self._singles:
            self._graphs += 1
            try:
                self._singles[batch] = self._single(batch, self._graphs)
            except Exception as error:
                raise BackendError(f"the decoder's inputs for {batch} prompts at once: {_explained(error)}") from error
        self._logits = np.zeros((batch, self._shape.vocab_size), np.float32)
        self._batch = batch

    def clear(self) -> None:
        """Forget what the cache holds; see :class:`DecoderSession`."""
        self._batch = 0
        self._forgets = True

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement] = (),
    ) -> np.ndarray:
        """Run the decoder over new tokens; see :class:`DecoderSession`."""
        embeds = with_features(inputs_embeds, pictures)
        shape = self._shape
        # Of another dtype, their bytes would be taken for numbers of this one.
        if embeds.shape != (self._batch, *embeds.shape[1:2], shape.hidden_size) or embeds.dtype != shape.dtype:
            want = f"{shape.dtype} [{self._batch}, tokens, {shape.hidden_size}]"
            raise BackendError(f"the decoder's inputs_embeds: want {want}, found {embeds.dtype} {[*embeds.shape]}")
        began = time.perf_counter()
        try:
            if embeds.shape[1] == 1:
                return self._step_single(embeds, write_indices)
            for row in range(self._batch):
                self._step_row(row, embeds[row], int(write_indices[row]), int(last_index[row]))
            return self._logits
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in the decoder: {_explained(error)}") from error
        finally:
            self.run_seconds += time.perf_counter() - began

    def _step_single(self, embeds: np.ndarray, slots: np.ndarray) -> np.ndarray:
        single = self._singles[self._batch]
        single.inputs["inputs_embeds"].update_inplace(np.ascontiguousarray(embeds))
        single.inputs[LAST_SLOTS].update_inplace(slots.astype(np.int32))
        single.run()
        logits: np.ndarray = single.outputs["logits"].numpy()
        return logits

    def _step_row(self, row: int, embeds: np.ndarray, start: int, last: int) -> None:
        """New tokens of one row, ``[seq, hidden]``, to its logits."""
        total = start + len(embeds)
        arrays = {
            "inputs_embeds": embeds[None],
            "last_index": np.array([last], np.int64),
            LAST_SLOTS: np.array([total - 1], np.int32),
        }
        held = {name: self._provider.value(array) for name, array in arrays.items()}
        held[TOTAL_SLOTS] = on_the_host(np.array(total, np.int32))
        binding = self._session.io_binding()
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        self._bind_cache(binding, row, 1)
        binding.bind_ortvalue_output("logits", self._row_logits)
        self._session.run_with_iobinding(binding, run_options(NO_REPLAY))
        self._logits[row] = self._row_logits.numpy()[0]

    def _allocate(self, rows: int) -> None:
        """A cache of zeros: a slot that is not seen still meets a weight of 0, and 0 x NaN is NaN."""
        shape = self._shape
        self._rows = 0
        self._cache.clear()  # the old buffers go before new ones come
        self._singles: dict[int, Replayed] = {}
        size = (rows, shape.kv_heads, self.max_len, shape.head_dim)
        try:
            for layer in range(shape.layers):
                for part in ("key", "value"):
                    self._cache[layer, part] = self._provider.zeros(self._session, size, shape.dtype)
            self._row_logits = self._provider.value(np.zeros((1, shape.vocab_size), np.float32))
        except Exception as error:
            self._cache.clear()
            wanted = 2 * shape.layers * np.prod(size, dtype=np.int64) * np.dtype(shape.dtype).itemsize
            raise BackendError(
                f"the KV cache of {rows} x {self.max_len} tokens wants {wanted:,} bytes of the GPU's memory: "
                f"{cause(error)}; load the bundle with a smaller max_len (--max-len) or give fewer prompts at once"
            ) from error
        self._rows = rows

    def _clear_cache(self) -> None:
        """Zeros into the cache that is there: its addresses stay, and the runs that were captured over them."""
        shape = self._shape
        zeros = np.zeros((self._rows, shape.kv_heads, self.max_len, shape.head_dim), shape.dtype)
        try:
            for buffer in self._cache.values():
                buffer.update_inplace(zeros)
        except Exception as error:
            raise BackendError(f"the decoder's cache cannot be cleared: {_explained(error)}") from error

    def _single(self, batch: int, graph: int) -> Replayed:
        """Inputs and outputs of steps with one token a row."""
        shape, value = self._shape, self._provider.value
        inputs = {
            "inputs_embeds": value(np.zeros((batch, 1, shape.hidden_size), shape.dtype)),
            "last_index": value(np.zeros(batch, np.int64)),
            LAST_SLOTS: value(np.zeros(batch, np.int32)),
            TOTAL_SLOTS: on_the_host(np.array(self.max_len, np.int32)),
        }
        logits = value(np.zeros((batch, shape.vocab_size), np.float32))
        single = Replayed(self._session, inputs, {"logits": logits}, graph)
        self._bind_cache(single.binding, 0, batch)
        return single

    def _bind_cache(self, binding: onnxruntime.IOBinding, first: int, rows: int) -> None:
        """Some rows of the cache as past and as present."""
        shape = self._shape
        dtype = np.dtype(shape.dtype)
        size = [rows, shape.kv_heads, self.max_len, shape.head_dim]
        offset = first * shape.kv_heads * self.max_len * shape.head_dim * dtype.itemsize
        for (layer, part), buffer in self._cache.items():
            place = (self._provider.device, 0, dtype.type, size, buffer.data_ptr() + offset)
            binding.bind_input(past_name(layer, part), *place)
            binding.bind_output(present_name(layer, part), *place)


def _explained(error: Exception) -> str:
    found = cause(error)
    if any(words in found for words in ("Failed to allocate", "out of memory")):
        return f"{found}; load the bundle with a smaller max_len (--max-len) or give fewer prompts at once"
    return found

"""ONNX Runtime sessions over the two graphs; the cache's buffers are bound as past and present at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_deploy.engines.contract import DecoderShape, VisionShape, past_name, present_name
from llava_deploy.engines.errors import BackendError, OptionError
from llava_deploy.engines.names import ACCURACY_LEVEL_ENTRY, INT8_FROM_TOKENS, PREFILL_TOKENS, AccuracyLevel
from llava_deploy.engines.onnxruntime_module import cause, import_onnxruntime
from llava_deploy.runtime.backend import Placement
from llava_deploy.runtime.onnxruntime_feed import TokenFeed, step_feed

if TYPE_CHECKING:
    import onnxruntime


_IMAGES_AT_ONCE = 16
_VERIFY = "do the bundle's manifest and graphs belong together? Hold it against its checkpoint: llava-deploy verify"
_STOP_SPINNING = "session.force_spinning_stop"
MOST_THREADS = 1024
"""ONNX Runtime starts as many as it is told to, and the process ends where the system gives no more."""


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """How sessions run.

    Attributes:
        threads: of one operator; ``None`` takes one a physical core, as ONNX Runtime does.
        accuracy_level: what products with quantised weights are computed in; ``None`` where there are none.
    """

    threads: int | None
    accuracy_level: AccuracyLevel | None

    def __post_init__(self) -> None:
        if self.threads is not None and not (type(self.threads) is int and 1 <= self.threads <= MOST_THREADS):
            reason = f"want 1 to {MOST_THREADS}, got {self.threads!r}; leave it out for one a physical core"
            raise OptionError("threads", reason)


def onnxruntime_version() -> str:
    """Version of the ONNX Runtime that is installed."""
    return str(import_onnxruntime().__version__)


class OnnxRuntimeVision:
    """The vision graph on the CPU; ``rounds`` says that it computes in 8-bit integers."""

    def __init__(self, model: Path, shape: VisionShape, options: OnnxRuntimeOptions, *, rounds: bool = False) -> None:
        self.rounds = rounds
        self._session = _open(model, options)
        self._shape = shape
        self._spec = shape.spec()
        self.max_images = _IMAGES_AT_ONCE

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """``[images, 3, height, width]`` to ``[images, patches, hidden]``; see :class:`VisionSession`."""
        feed = {"pixel_values": pixel_values.astype(self._shape.dtype, copy=False)}
        self._spec.check(feed)
        try:
            features: np.ndarray = self._session.run(["image_features"], feed)[0]
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in the vision tower: {cause(error)}; {_VERIFY}") from error
        return features

    def clock(self) -> None:
        """There is nothing that :meth:`encode` has not waited for."""


class OnnxRuntimeDecoder:
    """The decoder graph on the CPU.

    The buffers of the cache are allocated once for a batch size; each is one ``OrtValue`` bound as ``past`` and as
    ``present``, so new keys are written in place. A built engine attends to the buffers themselves; the canonical
    graph's Slice is a copy of what is visible of them, at every step.
    """

    def __init__(
        self,
        model: Path,
        shape: DecoderShape,
        max_len: int,
        options: OnnxRuntimeOptions,
        int8_model: Path | None = None,
    ) -> None:
        """Load the graphs.

        Args:
            model: the decoder.
            shape: of it.
            max_len: slots of the cache.
            options: how sessions run.
            int8_model: the decoder once more, for steps of :data:`~llava_deploy.engines.names.INT8_FROM_TOKENS` tokens
                and more.

        Raises:
            BackendError: ONNX Runtime is not installed, or cannot load a graph.
        """
        self._ort = import_onnxruntime()
        self._sessions = [_open(path, options) for path in (model, int8_model) if path is not None]
        self.rounds = int8_model is not None
        """Its long steps compute in 8-bit integers."""
        self._wanted = frozenset(value.name for value in self._sessions[0].get_inputs())
        self._shape = shape
        self._cache_dtype = _cache_dtype(self._sessions[0])
        self.max_len = max_len
        self.max_seq = min(PREFILL_TOKENS, max_len)
        self.run_seconds = 0.0
        self._batch = 0

    def begin(self, batch: int) -> None:
        """Have a cache for ``batch`` rows; see :class:`DecoderSession`."""
        if batch == self._batch:
            return
        shape = self._shape
        self._batch = 0
        self._caches: dict[tuple[int, str], onnxruntime.OrtValue] = {}  # the old buffers go before new ones come
        size = (batch, shape.kv_heads, self.max_len, shape.head_dim)
        try:
            self._bindings = [session.io_binding() for session in self._sessions]
            for layer in range(shape.layers):
                for part in ("key", "value"):
                    # Zeros, not empty: a slot that the mask hides still meets a weight of 0, and 0 x NaN is NaN.
                    buffer = self._value(np.zeros(size, self._cache_dtype))
                    self._caches[layer, part] = buffer
                    for binding in self._bindings:
                        binding.bind_ortvalue_input(past_name(layer, part), buffer)
                        binding.bind_ortvalue_output(present_name(layer, part), buffer)
            self._logits = np.zeros((batch, shape.vocab_size), np.float32)
            self._token_feed = TokenFeed(shape, batch, self.max_len, self._wanted, self._value)
            for binding in self._bindings:
                binding.bind_ortvalue_output("logits", self._value(self._logits))
            self._of_tokens = self._at(batch)
        except MemoryError as error:
            wanted = 2 * shape.layers * np.prod(size, dtype=np.int64) * self._cache_dtype.itemsize
            raise BackendError(
                f"the KV cache of {batch} x {self.max_len} tokens wants {wanted:,} bytes, which the machine does not "
                "have; load the bundle with a smaller max_len (--max-len) or give fewer prompts at once"
            ) from error
        except RuntimeError as error:
            raise BackendError(f"the decoder's cache cannot be bound: {cause(error)}; {_VERIFY}") from error
        self._batch = batch

    def clear(self) -> None:
        """Forget what the cache holds; see :class:`DecoderSession`."""
        self._batch = 0

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement] = (),
    ) -> np.ndarray:
        """Run the decoder over new tokens; see :class:`DecoderSession`."""
        single = self._token_feed
        if single.takes(inputs_embeds, write_indices) and not pictures:
            session, binding = self._of_tokens
            single.bind(binding, inputs_embeds, write_indices)
        else:
            session, binding = self._at(inputs_embeds.shape[0] * inputs_embeds.shape[1])
            single.release()
            feed = step_feed(inputs_embeds, write_indices, last_index, pictures, self._wanted)
            # Held until the run is over: an OrtValue does not own the array's memory, and a binding owns no OrtValue.
            values = [self._value(np.ascontiguousarray(array)) for array in feed.values()]
            for name, value in zip(feed, values, strict=True):
                binding.bind_ortvalue_input(name, value)
        began = time.perf_counter()
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed in the decoder: {cause(error)}; {_VERIFY}") from error
        self.run_seconds += time.perf_counter() - began
        return self._logits

    def _at(self, tokens: int) -> tuple[onnxruntime.InferenceSession, onnxruntime.IOBinding]:
        """What runs steps of so many tokens, all rows together."""
        index = -1 if tokens >= INT8_FROM_TOKENS else 0
        return self._sessions[index], self._bindings[index]

    def _value(self, array: np.ndarray) -> onnxruntime.OrtValue:
        """An ``OrtValue`` over the array's own memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)


def _cache_dtype(session: onnxruntime.InferenceSession) -> np.dtype:
    """float32 in an engine, which computes in it; the canonical graph's cache is of the bundle's float type."""
    kinds = {value.name: value.type for value in session.get_inputs()}
    return np.dtype(np.float16 if kinds.get(past_name(0, "key")) == "tensor(float16)" else np.float32)


def _open(model: Path, options: OnnxRuntimeOptions) -> onnxruntime.InferenceSession:
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # its errors come as exceptions, its warnings are of the graph's making
    # Threads that wait for more work of a session that is done would take the cores from the session that runs next.
    settings.add_session_config_entry(_STOP_SPINNING, "1")
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if options.accuracy_level is not None:
        settings.add_session_config_entry(ACCURACY_LEVEL_ENTRY, str(options.accuracy_level))
    try:
        return ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(
            f"{model}: ONNX Runtime {ort.__version__} cannot load it: {cause(error)}; want version 1.25 or later"
        ) from error

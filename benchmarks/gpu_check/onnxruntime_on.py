"""ONNX Runtime on the GPU over the canonical graphs, as a yardstick of what lowering them brings.

The product's backend there, ``onnxruntime-cuda``, runs a lowered decoder in a CUDA graph. This one runs what is in the
bundle as it is, its buffers where it computes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from outcome import NotRunError

from llava_deploy.engines.contract import DecoderShape, VisionShape, past_name, present_name
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH
from llava_deploy.engines.names import ACCURACY_LEVEL_ENTRY
from llava_deploy.engines.onnxruntime_module import import_onnxruntime
from llava_deploy.runtime import Llava
from llava_deploy.runtime.backend import Placement
from llava_deploy.runtime.bundle import open_bundle
from llava_deploy.runtime.encoding import PromptEncoder
from llava_deploy.runtime.onnxruntime_feed import step_feed

Device = Literal["cuda", "cpu"]
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
MAX_SEQ = 1024


def open_session(graph: Path, device: Device) -> Any:
    """Load a graph.

    Raises:
        NotRunError: this ONNX Runtime cannot compute there.
    """
    onnxruntime, name = import_onnxruntime(), PROVIDERS[device]
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN of PyTorch's packages
    if name not in onnxruntime.get_available_providers():
        raise NotRunError(f"ONNX Runtime {onnxruntime.__version__} is installed without {name}")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry(ACCURACY_LEVEL_ENTRY, "1")  # on the CPU, as PyTorch computes
    session = onnxruntime.InferenceSession(str(graph), settings, providers=[name])
    if name not in session.get_providers():  # it goes on without one that cannot start
        raise NotRunError(f"ONNX Runtime cannot start {name} here")
    return session


class YardstickVision:
    """The vision graph."""

    max_images = 16

    def __init__(self, bundle: Path, shape: VisionShape, device: Device) -> None:
        self._shape = shape
        self._session = open_session(bundle / VISION_GRAPH, device)

    def encode(self, pixel_values: np.ndarray) -> np.ndarray:
        """``[images, 3, height, width]`` to ``[images, patches, hidden]``."""
        feed = {"pixel_values": pixel_values.astype(self._shape.dtype, copy=False)}
        features: np.ndarray = self._session.run(["image_features"], feed)[0]
        return features

    def clock(self) -> None:
        """There is nothing that :meth:`encode` has not waited for."""


class YardstickDecoder:
    """The decoder graph; each buffer of the cache is bound as past and as present."""

    def __init__(self, bundle: Path, shape: DecoderShape, max_len: int, device: Device) -> None:
        self.max_len = max_len
        self.max_seq = min(MAX_SEQ, max_len)
        self.run_seconds = 0.0
        self._shape, self._device, self._batch = shape, device, 0
        self._session = open_session(bundle / DECODER_GRAPH, device)
        self._wanted = frozenset(value.name for value in self._session.get_inputs())
        self._make = import_onnxruntime().OrtValue.ortvalue_from_numpy

    def begin(self, batch: int) -> None:
        """Have a cache for ``batch`` rows."""
        if batch == self._batch:
            return
        shape = self._shape
        self._binding = self._session.io_binding()
        self._held: list[Any] = []  # a binding owns no value
        size = (batch, shape.kv_heads, self.max_len, shape.head_dim)
        for layer in range(shape.layers):
            for part in ("key", "value"):
                buffer = self._value(np.zeros(size, shape.dtype))
                self._binding.bind_ortvalue_input(past_name(layer, part), buffer)
                self._binding.bind_ortvalue_output(present_name(layer, part), buffer)
                self._held.append(buffer)
        self._logits = np.zeros((batch, shape.vocab_size), np.float32)
        self._binding.bind_ortvalue_output("logits", self._make(self._logits))
        self._batch = batch

    def clear(self) -> None:
        """Forget what the cache holds."""
        self._batch = 0

    def step(
        self,
        inputs_embeds: np.ndarray,
        write_indices: np.ndarray,
        last_index: np.ndarray,
        pictures: Sequence[Placement] = (),
    ) -> np.ndarray:
        """Run the decoder over new tokens."""
        feed = step_feed(inputs_embeds, write_indices, last_index, pictures, self._wanted)
        values = {name: self._value(array) for name, array in feed.items()}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        began = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        self.run_seconds += time.perf_counter() - began
        return self._logits

    def _value(self, array: np.ndarray) -> Any:
        return self._make(np.ascontiguousarray(array), self._device, 0)


def load(bundle: Path, max_len: int | None, device: Device) -> Llava:
    """The bundle in the runtime, over these sessions."""
    opened = open_bundle(bundle)
    shape = opened.manifest.decoder
    decoder = YardstickDecoder(bundle, shape, shape.max_positions if max_len is None else max_len, device)
    vision = YardstickVision(bundle, opened.manifest.vision, device)
    version = import_onnxruntime().__version__
    backend = f"ONNX Runtime {version}, {PROVIDERS[device]}, canonical graphs (a yardstick)"
    return Llava(opened, PromptEncoder(opened, vision), decoder, backend)

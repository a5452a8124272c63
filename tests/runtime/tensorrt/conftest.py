"""Engines of the demo model on the fake GPU, and the same graphs in ONNX Runtime beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from llava_deploy.engines.engine_manifest import decoder_plans, read_engine_manifest
from llava_deploy.engines.manifest import DECODER_GRAPH, VISION_GRAPH, Manifest, read_manifest
from llava_deploy.engines.tensorrt_module import TensorRtBackend, import_tensorrt
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeOptions, OnnxRuntimeVision
from llava_deploy.runtime.tensorrt.cuda import Device
from llava_deploy.runtime.tensorrt.decoder import TensorRtDecoder
from llava_deploy.runtime.tensorrt.plans import open_plans
from llava_deploy.runtime.tensorrt.vision import TensorRtVision

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

FULL = "11.4.0.106"


@dataclass(frozen=True)
class Sessions:
    """Both graphs on the GPU."""

    vision: TensorRtVision
    decoder: TensorRtDecoder
    manifest: Manifest


@pytest.fixture
def load(fake_gpu: FakeGpu) -> Callable[..., Sessions]:
    """Open an engine's directory, made by ``fake_gpu.write_engine``."""

    def load(bundle: Path, directory: Path, backend: TensorRtBackend = "tensorrt-rtx", max_len: int = 256) -> Sessions:
        device, manifest = Device(), read_manifest(bundle)
        recipe = read_engine_manifest(directory).key.tensorrt
        assert recipe is not None
        plans = open_plans(directory, ["vision.plan", *decoder_plans(recipe)], import_tensorrt(backend), device)
        decoder = TensorRtDecoder(plans[1:], manifest.decoder, max_len)
        return Sessions(TensorRtVision(plans[0], manifest.vision), decoder, manifest)

    return load


@pytest.fixture(
    params=[("tensorrt-rtx", (4,)), ("tensorrt", (4,)), ("tensorrt-rtx", (1, 3)), ("tensorrt", (2, 1, 1))],
    ids=lambda param: f"{param[0]} in {len(param[1])}",
)
def sessions(
    request: pytest.FixtureRequest,
    fake_gpu: FakeGpu,
    demo_bundle: Path,
    tmp_path: Path,
    load: Callable[..., Sessions],
) -> Sessions:
    """The demo model in float32, with TensorRT for RTX and with the full TensorRT, in one part and in several."""
    fake_gpu.provide("tensorrt", FULL)
    backend, parts = request.param
    version = {"version": FULL} if backend == "tensorrt" else {}
    directory = fake_gpu.write_engine(demo_bundle, tmp_path / "engine", backend=backend, parts=parts, **version)
    return load(demo_bundle, directory, backend)


@pytest.fixture
def reference(demo_bundle: Path) -> tuple[OnnxRuntimeVision, OnnxRuntimeDecoder]:
    """The canonical graphs of the demo model in ONNX Runtime."""
    manifest, options = read_manifest(demo_bundle), OnnxRuntimeOptions(1, None)
    decoder = OnnxRuntimeDecoder(demo_bundle / DECODER_GRAPH, manifest.decoder, 256, options)
    return OnnxRuntimeVision(demo_bundle / VISION_GRAPH, manifest.vision, options), decoder


@pytest.fixture
def embeddings(demo_bundle: Path) -> Callable[..., np.ndarray]:
    """Random embeddings ``[batch, seq, hidden]`` of the size of the model's own."""
    table = np.load(demo_bundle / "embed_tokens.npy")
    rng = np.random.default_rng(0)
    return lambda batch, seq: table[rng.integers(0, len(table), (batch, seq))]

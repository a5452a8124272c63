"""Decoders and towers with random weights, and models run by ONNX Runtime as they stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from llava_deploy.exporter.config import DecoderConfig, LlavaConfig, ProjectorConfig, VisionConfig
from llava_deploy.exporter.graphs import Graphs, build_graphs
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.weight import WeightFormat

Run = Callable[[ir.Model, Mapping[str, np.ndarray]], dict[str, np.ndarray]]

TOWER = VisionConfig("clip_vision_model", 16, 24, 2, 2, 16, 8, 3, "gelu", 1e-5)


def small_llava(decoder: DecoderConfig, **fields: Any) -> LlavaConfig:
    """The decoder behind a small tower."""
    vision = fields.get("vision", TOWER)
    layers = fields.get("feature_layers", (-1,))
    projector = ProjectorConfig((vision.hidden_size * len(layers), decoder.hidden_size), "gelu", True)
    select = fields.get("feature_select", "patch")
    return LlavaConfig("llava-hf", vision, projector, decoder, layers, select, None, None, None, "right")


def fill(model: ir.Model, seed: int) -> None:
    """Draw every weight that has no values."""
    rng = np.random.default_rng(seed)
    for value in model.graph.initializers.values():
        if value.const_value is None:
            value.const_value = _draw(value, rng)


def _draw(value: ir.Value, rng: np.random.Generator) -> ir.TensorProtocol:
    assert value.shape is not None
    assert value.dtype is not None
    name, sizes = str(value.name), value.shape.numpy()
    if value.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        packed = rng.integers(0, 256, (int(np.prod(sizes)) + 1) // 2, np.uint8)
        return ir.PackedTensor(packed, value.dtype, shape=ir.Shape(sizes), name=name)
    if value.dtype == ir.DataType.INT8:
        return ir.tensor(rng.integers(-127, 128, sizes, np.int8), name=name)
    if value.dtype == ir.DataType.INT64:
        return ir.tensor(rng.permutation(sizes[0]).astype(np.int64), name=name)
    if name.endswith("_scale"):
        largest = 0.02 if len(sizes) > 1 else 0.002
        values = rng.uniform(largest / 4, largest, sizes)
    elif len(sizes) > 1:
        values = rng.standard_normal(sizes) / np.sqrt(np.prod(sizes[1:]))
    else:
        values = rng.uniform(0.5, 1, sizes) * (1 if "norm" in name else rng.choice([-0.1, 0.1], sizes))
    return ir.tensor(values.astype(value.dtype.numpy()), name=name)


@pytest.fixture(scope="session")
def draw_graphs() -> Callable[..., Graphs]:
    """Both canonical graphs: ``draw_graphs(decoder_config, precision, seed, weight=None, head=None, **fields)``.

    ``weight`` is the format of all linear layers of the decoder but the output layer, ``head`` that one's; ``fields``
    are the tower's config ``vision``, ``feature_layers`` and ``feature_select``.
    """

    def draw(
        decoder: DecoderConfig,
        precision: Any,
        seed: int = 0,
        weight: WeightFormat | None = None,
        head: WeightFormat | None = None,
        **fields: Any,
    ) -> Graphs:
        config = small_llava(decoder, **fields)
        formats = {} if weight is None else dict.fromkeys(decoder_linears(config), weight)
        if head is not None:
            formats["lm_head.weight"] = head
        graphs = build_graphs(config, precision, formats)
        fill(graphs.vision, seed)
        fill(graphs.decoder, seed + 1)
        vision, decoder = (ir.from_proto(ir.to_proto(model)) for model in (graphs.vision, graphs.decoder))  # as if read
        return dataclasses.replace(graphs, vision=vision, decoder=decoder)

    return draw


@pytest.fixture(scope="session")
def run_model() -> Run:
    """Outputs of a model by name, no operator fused with another."""

    def run(model: ir.Model, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = open_session(ir.to_proto(model).SerializeToString())
        names: Sequence[str] = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feed)), strict=True))

    return run


def open_session(content: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="session")
def session_of() -> Callable[[ir.Model], onnxruntime.InferenceSession]:
    """A session over a model, to be run several times."""
    return lambda model: open_session(ir.to_proto(model).SerializeToString())

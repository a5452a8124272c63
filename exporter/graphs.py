"""The two canonical graphs: modules wired to the names that the contract states. No arithmetic here.

Parameters carry canonical tensor names and no data; :mod:`llava_deploy.exporter.weights` gives them theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from llava_deploy.engines.contract import (
    IR_VERSION,
    OPSET_VERSION,
    DecoderShape,
    GraphSpec,
    VisionShape,
    past_name,
)
from llava_deploy.engines.names import Precision
from llava_deploy.exporter.blocks import quantize_linears
from llava_deploy.exporter.config import LlavaConfig
from llava_deploy.exporter.decoders.interface import Cache, StepInputs
from llava_deploy.exporter.halves import LanguageModel, VisionEncoder
from llava_deploy.exporter.quantization.weight import WeightFormat

DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "int4": "float16", "int4-awq": "float16"}
"""What the graphs compute in; int4 is a matter of the decoder's weights."""


@dataclass(frozen=True)
class Graphs:
    """Both models, with the specs that they were built from; parameters have no data yet."""

    vision: ir.Model
    decoder: ir.Model
    vision_shape: VisionShape
    decoder_shape: DecoderShape


def vision_shape(config: LlavaConfig, precision: Precision) -> VisionShape:
    """The vision graph's fixed sizes."""
    size = config.vision.image_size
    hidden = config.decoder.hidden_size
    return VisionShape(DTYPES[precision], size, size, config.image_features, hidden)


def decoder_shape(config: LlavaConfig, precision: Precision) -> DecoderShape:
    """The decoder graph's fixed sizes."""
    c = config.decoder
    return DecoderShape(
        dtype=DTYPES[precision],
        hidden_size=c.hidden_size,
        layers=c.num_hidden_layers,
        kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        max_positions=c.max_position_embeddings,
    )


def build_graphs(config: LlavaConfig, precision: Precision, formats: Mapping[str, WeightFormat]) -> Graphs:
    """Build both canonical graphs of a model, without weights; ``formats`` names the decoder's quantised weights."""
    vision, decoder = vision_shape(config, precision), decoder_shape(config, precision)
    dtype = ir.DataType.from_numpy(np.dtype(vision.dtype))
    return Graphs(
        _vision_graph(config, vision, dtype), _decoder_graph(config, decoder, dtype, formats), vision, decoder
    )


def _vision_graph(config: LlavaConfig, shape: VisionShape, dtype: ir.DataType) -> ir.Model:
    spec = shape.spec()
    builder, inputs = _begin(spec)
    features = VisionEncoder(config, dtype)(builder.op, inputs["pixel_values"])
    return _finish(builder, spec, [builder.op.Identity(features)])


def _decoder_graph(
    config: LlavaConfig, shape: DecoderShape, dtype: ir.DataType, formats: Mapping[str, WeightFormat]
) -> ir.Model:
    spec = shape.spec()
    builder, inputs = _begin(spec)
    layers = range(config.decoder.num_hidden_layers)
    past = [Cache(inputs[past_name(i, "key")], inputs[past_name(i, "value")]) for i in layers]
    step = StepInputs(**{field.name: inputs[field.name] for field in dataclasses.fields(StepInputs)})
    model = LanguageModel(config, dtype)
    quantize_linears(model, formats, dtype)
    logits, present = model(builder.op, step, past)
    return _finish(builder, spec, [logits, *(value for cache in present for value in (cache.key, cache.value))])


def _begin(spec: GraphSpec) -> tuple[GraphBuilder, dict[str, ir.Value]]:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET_VERSION}, name=spec.name)
    builder = GraphBuilder(graph)
    inputs = {
        s.name: builder.input(s.name, ir.DataType.from_numpy(np.dtype(s.dtype)), list(s.shape)) for s in spec.inputs
    }
    return builder, inputs


def _finish(builder: GraphBuilder, spec: GraphSpec, outputs: list[ir.Value]) -> ir.Model:
    for value, want in zip(outputs, spec.outputs, strict=True):
        value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(want.dtype)))
        value.shape = ir.Shape(list(want.shape))
        builder.add_output(value, want.name)
    return ir.Model(builder.graph, ir_version=IR_VERSION, producer_name="llava-deploy")

"""The two canonical graphs: modules wired to the names that the contract states. No arithmetic here.

Parameters carry canonical tensor names and no data; :mod:`llava_deploy.exporter.weights` gives them theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from llava_deploy.engines.contract import (
    IR_VERSION,
    OPSET_VERSION,
    DecoderShape,
    GraphSpec,
    VisionShape,
    past_name,
)
from llava_deploy.exporter.blocks import Linear
from llava_deploy.exporter.config import LlavaConfig
from llava_deploy.exporter.decoders import llama
from llava_deploy.exporter.projector import Projector
from llava_deploy.exporter.towers import clip_vision_model

Precision = Literal["fp32", "fp16"]
DTYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16"}
TOWERS = {"clip_vision_model": clip_vision_model.VisionTower}
DECODERS = {"llama": llama.Decoder}
TOWER_FEATURES = "tower_features"
"""Name, inside the vision graph, of what goes into the projector."""


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


def build_graphs(config: LlavaConfig, precision: Precision) -> Graphs:
    """Build both canonical graphs of a model, without weights."""
    vision, decoder = vision_shape(config, precision), decoder_shape(config, precision)
    dtype = ir.DataType.from_numpy(np.dtype(vision.dtype))
    return Graphs(_vision_graph(config, vision, dtype), _decoder_graph(config, decoder, dtype), vision, decoder)


def resolved_feature_layers(config: LlavaConfig) -> tuple[int, ...]:
    """Feature layers as non-negative indices into the tower's hidden states."""
    states = config.vision.num_hidden_layers + 1
    return tuple(layer % states for layer in config.feature_layers)


def vision_modules(config: LlavaConfig, dtype: ir.DataType) -> tuple[nn.Module, Projector]:
    """Tower and projector."""
    tower = TOWERS[config.vision.model_type](config.vision, resolved_feature_layers(config), dtype)
    projector = Projector(config.projector, dtype)
    projector._set_name("projector")
    return tower, projector


def decoder_modules(config: LlavaConfig, dtype: ir.DataType) -> tuple[nn.Module, Linear]:
    """Decoder and output layer; a tied output layer's weight has the name of the embedding table."""
    c = config.decoder
    decoder = DECODERS[c.model_type](c, dtype)
    head = Linear(c.hidden_size, c.vocab_size, False, dtype)
    if c.tie_word_embeddings:
        head.weight.name = "embed_tokens.weight"
    head._set_name("language_model" if c.tie_word_embeddings else "lm_head")
    return decoder, head


def _vision_graph(config: LlavaConfig, shape: VisionShape, dtype: ir.DataType) -> ir.Model:
    spec = shape.spec()
    builder, inputs = _begin(spec)
    tower, projector = vision_modules(config, dtype)
    features = tower(builder.op, inputs["pixel_values"])  # [images, 1 + patches, features]
    if config.feature_select == "patch":
        features = builder.op.Slice(features, [1], [config.vision.patches + 1], [1])
    features.name = TOWER_FEATURES
    return _finish(builder, spec, [builder.op.Identity(projector(builder.op, features))])


def _decoder_graph(config: LlavaConfig, shape: DecoderShape, dtype: ir.DataType) -> ir.Model:
    spec = shape.spec()
    builder, inputs = _begin(spec)
    decoder, head = decoder_modules(config, dtype)
    layers = range(config.decoder.num_hidden_layers)
    past = [llama.Cache(inputs[past_name(i, "key")], inputs[past_name(i, "value")]) for i in layers]
    steps = ("inputs_embeds", "position_ids", "write_indices", "attention_mask", "last_index")
    hidden, present = decoder(builder.op, *(inputs[name] for name in steps), past)
    logits = builder.op.Cast(head(builder.op, hidden), to=ir.DataType.FLOAT)
    caches = [value for cache in present for value in (cache.key, cache.value)]
    return _finish(builder, spec, [logits, *caches])


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

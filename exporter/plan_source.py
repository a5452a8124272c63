"""A checkpoint as the planner wants it: the tensors that an export would write, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from llava_deploy.engines.names import Precision
from llava_deploy.engines.planner.model import GraphWeights, PlannedModel, SourceWeights
from llava_deploy.engines.planner.onnx_header import TensorSize
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS, LM_HEAD, LlavaConfig
from llava_deploy.exporter.graphs import decoder_shape, vision_shape
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.held import quantized_in_decoder
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.quantization.weight import WeightFormat
from llava_deploy.exporter.weights import expected_tensors

_DECODER = ("language_model.", LM_HEAD)


def planned_checkpoint(checkpoint: Checkpoint, precision: Precision, options: QuantizeOptions) -> PlannedModel:
    """The model that an export of ``checkpoint`` would write; no value is read.

    Args:
        checkpoint: as it was opened.
        precision: of the bundle.
        options: how a float checkpoint would be rounded; of no effect on weights that are quantised already.
    """
    sources = checkpoint.tensors.values()
    largest = max(sources, key=lambda source: math.prod(source.shape))
    held = {name: source.format for name, source in quantized_in_decoder(checkpoint).items()}
    bits = {source.name: 8 * source.nbytes // max(1, math.prod(source.shape)) for source in sources}
    planned = planned_config(checkpoint.config, checkpoint.name, precision, options, held)
    if planned.source is None:
        return planned
    source = replace(
        planned.source,
        nbytes=sum(source.nbytes for source in sources),
        largest=TensorSize(largest.name, largest.shape, bits[largest.name]),
        is_converted=any(source.dtype != planned.decoder.dtype for source in sources),
    )
    return replace(planned, source=source)


def planned_config(
    config: LlavaConfig,
    name: str,
    precision: Precision,
    options: QuantizeOptions,
    held: Mapping[str, WeightFormat],
) -> PlannedModel:
    """The same of a config, for a checkpoint whose floats have 16 bits.

    Args:
        config: of the model.
        name: for people.
        precision: of the bundle.
        options: see :func:`planned_checkpoint`.
        held: the decoder's weights that are quantised already, by canonical name.
    """
    shapes = expected_tensors(config)
    formats = _formats(config, precision, options, held)
    tied = config.decoder.tie_word_embeddings and LM_HEAD not in formats
    if LM_HEAD in formats and LM_HEAD not in shapes:
        shapes[LM_HEAD] = shapes[EMBED_TOKENS]
    bits = 8 * np.dtype(decoder_shape(config, precision).dtype).itemsize
    tensors = [t for key, shape in shapes.items() for t in _stored(key, shape, bits, formats.get(key))]
    rope = (config.decoder.max_position_embeddings, config.decoder.head_dim // 2)
    decoder = [t for t in tensors if t.name.startswith(_DECODER) and t.name != EMBED_TOKENS]
    tables = (TensorSize(f"language_model.{name}", rope, bits) for name in ("cos", "sin"))
    largest = max(shapes, key=lambda key: math.prod(shapes[key]))
    return PlannedModel(
        name=name,
        precision=precision,
        vision=vision_shape(config, precision),
        decoder=decoder_shape(config, precision),
        vision_weights=GraphWeights(tuple(t for t in tensors if not t.name.startswith(_DECODER))),
        decoder_weights=GraphWeights((*decoder, *tables)),
        is_tied=tied,
        tower_heads=config.vision.num_attention_heads,
        source=SourceWeights(
            nbytes=sum(2 * math.prod(shape) for shape in shapes.values()),
            largest=TensorSize(largest, shapes[largest], 16),
            rounded=tuple(TensorSize(key, shapes[key], 16) for key in formats if key not in held),
            is_converted=precision == "fp32",
        ),
    )


def _formats(
    config: LlavaConfig, precision: Precision, options: QuantizeOptions, held: Mapping[str, WeightFormat]
) -> dict[str, WeightFormat]:
    if precision in ("fp32", "fp16"):
        return {}
    formats = dict(held) if held else dict.fromkeys(decoder_linears(config), options.weight_format)
    if options.head_format is not None:
        formats.setdefault(LM_HEAD, options.head_format)
    return formats


def _stored(name: str, shape: tuple[int, ...], bits: int, form: WeightFormat | None) -> Iterator[TensorSize]:
    """What a weight is in a graph, under the names of :class:`~llava_deploy.exporter.blocks.QuantizedLinear`."""
    if form is None:
        yield TensorSize(name, shape, bits)
        return
    out_features, in_features = shape
    groups = () if form.group_size is None else (in_features // form.group_size,)
    yield TensorSize(name, (in_features, out_features), form.bits)
    yield TensorSize(f"{name}_scale", (*groups, out_features), bits)
    if not form.symmetric:
        yield TensorSize(f"{name}_zero_point", (*groups, out_features), form.bits)
    if form.permuted:
        yield TensorSize(f"{name}_permutation", (in_features,), 64)

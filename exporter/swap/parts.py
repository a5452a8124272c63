"""The model after a swap: its part from the checkpoint, once it is known to fit, all else as the bundle stores it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from llava_deploy.engines.contract import DecoderShape, VisionShape
from llava_deploy.engines.errors import InputError
from llava_deploy.engines.lowering.opening import open_model
from llava_deploy.engines.manifest import DECODER_GRAPH, TOKENIZER, VISION_GRAPH, Manifest
from llava_deploy.engines.names import SwapPart
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS, LM_HEAD, PROJECTOR
from llava_deploy.exporter.graphs import Graphs, build_graphs, decoder_shape, vision_shape
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.held import quantized_in_decoder
from llava_deploy.exporter.quantization.stored import stored_tensors, with_stored_decoder
from llava_deploy.exporter.quantization.weight import QuantizedSource, WeightFormat
from llava_deploy.exporter.sources.tensors import TensorSource
from llava_deploy.exporter.swap.stored import differs, stored_table
from llava_deploy.exporter.swap.structure import first_difference
from llava_deploy.exporter.swap.tokens import require_same_tokens

GRAPHS: Mapping[SwapPart, str] = {"projector": VISION_GRAPH, "decoder": DECODER_GRAPH}
"""The graph that holds each part."""


@dataclass(frozen=True)
class SwappedModel:
    """The model after a swap.

    Attributes:
        part: what is swapped.
        checkpoint: the part's weights from the checkpoint, all others and the recipes as the bundle stores them.
        graph: the part's, without weights.
        quantized: weights that the part's graph holds in few bits, by canonical names; of a projector none.
        rest_differs: how the rest of the checkpoint is another graph than the bundle's, so that PyTorch's model of the
            whole cannot be made; ``None`` where it is the same.
        notes: what of the checkpoint stays out, for people.
    """

    part: SwapPart
    checkpoint: Checkpoint
    graph: ir.Model
    quantized: Mapping[str, QuantizedSource]
    rest_differs: str | None
    notes: tuple[str, ...]


def swapped_model(checkpoint: Checkpoint, bundle: Path, manifest: Manifest, part: SwapPart) -> SwappedModel:
    """Put the part of ``checkpoint`` into the model of ``bundle``; no weight is written.

    Raises:
        InputError: the part's graph would be another one than the bundle's in anything but the values of weights, or
            the decoder's tokens are others; or the bundle's weights are quantised in a way that these cannot follow.
        BundleError: a graph of the bundle cannot be read.
    """
    if part == "projector":
        return _with_projector(checkpoint, bundle, manifest)
    return _with_decoder(checkpoint, bundle, manifest)


def _with_projector(checkpoint: Checkpoint, bundle: Path, manifest: Manifest) -> SwappedModel:
    precision = manifest.model.precision
    _require_shape(checkpoint, bundle, manifest.vision, vision_shape(checkpoint.config, precision))
    rest = _field_difference(manifest.decoder, decoder_shape(checkpoint.config, precision))
    formats = _stored_formats(checkpoint, bundle) if rest is None else {}
    graphs = build_graphs(_untied(checkpoint, formats).config, precision, formats)
    _require_graph(checkpoint, bundle, VISION_GRAPH, graphs)
    if rest is None:
        rest = first_difference(open_model(bundle / DECODER_GRAPH), graphs.decoder)
    given = with_stored_decoder(checkpoint, bundle) if rest is None else checkpoint
    tower = {name: s for name, s in _stored_vision(bundle, graphs).items() if not name.startswith(PROJECTOR)}
    tensors = {**given.tensors, **tower, EMBED_TOKENS: stored_table(bundle, manifest.decoder)}
    notes = []
    if any(differs(stored, checkpoint.tensors[name]) for name, stored in tower.items()):
        notes.append("its vision tower has other weights than the bundle's, which stay: export it to have both")
    if checkpoint.image != manifest.image:
        notes.append("it prepares pictures in another way than the bundle, whose way stays")
    return SwappedModel("projector", _completed(given, bundle, manifest, tensors), graphs.vision, {}, rest, (*notes,))


def _with_decoder(checkpoint: Checkpoint, bundle: Path, manifest: Manifest) -> SwappedModel:
    precision = manifest.model.precision
    _require_shape(checkpoint, bundle, manifest.decoder, decoder_shape(checkpoint.config, precision))
    require_same_tokens(checkpoint, bundle / TOKENIZER)
    given, kept = checkpoint, dict[str, QuantizedSource]()
    if manifest.quantization is not None:
        from llava_deploy.exporter.swap.quantized import quantized_as  # which imports torch

        formats = _stored_formats(checkpoint, bundle)
        given = quantized_as(_untied(checkpoint, formats), formats, manifest, bundle)
        kept = quantized_in_decoder(given)
    graphs = build_graphs(given.config, precision, {name: source.format for name, source in kept.items()})
    _require_graph(checkpoint, bundle, DECODER_GRAPH, graphs)
    rest = _field_difference(manifest.vision, vision_shape(given.config, precision))
    if rest is None:
        rest = first_difference(open_model(bundle / VISION_GRAPH), graphs.vision)
    vision = _stored_vision(bundle, graphs)
    notes = []
    if any(differs(stored, checkpoint.tensors[name]) for name, stored in vision.items() if name.startswith(PROJECTOR)):
        notes.append("its projector has other weights than the bundle's, which stay: swap it too, --part projector")
    if checkpoint.chat != manifest.chat:
        notes.append("it makes prompts in another way than the bundle, whose way stays")
    checkpoint = _completed(given, bundle, manifest, {**given.tensors, **vision})
    return SwappedModel("decoder", checkpoint, graphs.decoder, kept, rest, (*notes,))


def _completed(
    checkpoint: Checkpoint, bundle: Path, manifest: Manifest, tensors: Mapping[str, TensorSource]
) -> Checkpoint:
    """With the bundle's recipes, which a swap leaves alone."""
    text = (bundle / TOKENIZER).read_bytes()
    tensors = MappingProxyType(dict(tensors))
    return replace(checkpoint, tensors=tensors, image=manifest.image, chat=manifest.chat, tokenizer_json=text)


def _stored_formats(checkpoint: Checkpoint, bundle: Path) -> dict[str, WeightFormat]:
    """Of the bundle's quantised weights, by canonical names."""
    names = {*decoder_linears(checkpoint.config), LM_HEAD}
    stored = stored_tensors(bundle / DECODER_GRAPH, names)
    return {name: tensor.format for name, tensor in stored.items() if tensor.format is not None}


def _stored_vision(bundle: Path, graphs: Graphs) -> Mapping[str, TensorSource]:
    weights = {name for name, value in graphs.vision.graph.initializers.items() if value.const_value is None}
    return stored_tensors(bundle / VISION_GRAPH, weights)


def _untied(checkpoint: Checkpoint, formats: Mapping[str, WeightFormat]) -> Checkpoint:
    """A tied output layer that the bundle has quantised is a layer of its own, made from the embeddings."""
    config = checkpoint.config
    if not config.decoder.tie_word_embeddings or LM_HEAD not in formats:
        return checkpoint
    tensors = MappingProxyType({**checkpoint.tensors, LM_HEAD: checkpoint.tensors[EMBED_TOKENS]})
    decoder = replace(config.decoder, tie_word_embeddings=False)
    return replace(checkpoint, config=replace(config, decoder=decoder), tensors=tensors)


def _require_shape(
    checkpoint: Checkpoint, bundle: Path, stored: VisionShape | DecoderShape, made: VisionShape | DecoderShape
) -> None:
    difference = _field_difference(stored, made)
    if difference is not None:
        raise _another_model(checkpoint, bundle, difference)


def _require_graph(checkpoint: Checkpoint, bundle: Path, name: str, graphs: Graphs) -> None:
    made = {VISION_GRAPH: graphs.vision, DECODER_GRAPH: graphs.decoder}[name]
    difference = first_difference(open_model(bundle / name), made)
    if difference is not None:
        raise _another_model(checkpoint, bundle, f"{name}, {difference}")


def _field_difference(stored: VisionShape | DecoderShape, made: VisionShape | DecoderShape) -> str | None:
    return next(_field_differences(stored, made), None)


def _field_differences(stored: VisionShape | DecoderShape, made: VisionShape | DecoderShape) -> Iterator[str]:
    for field in dataclasses.fields(stored):
        want, found = getattr(stored, field.name), getattr(made, field.name)
        if want != found:
            yield f"{field.name}: want {want}, found {found}"


def _another_model(checkpoint: Checkpoint, bundle: Path, difference: str) -> InputError:
    return InputError(
        f"{checkpoint.directory}: another model than {bundle} holds, and a swap changes weights only; {difference}; "
        "give a checkpoint of the same model, or export this one to a bundle of its own"
    )

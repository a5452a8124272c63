"""Which weights of a model are stored in few bits, by round to nearest or as the checkpoint has them already."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS, LM_HEAD
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.held import quantized_in_decoder
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.quantization.rtn import RoundedTensor, require_form
from llava_deploy.exporter.quantization.weight import WeightFormat
from llava_deploy.exporter.sources.tensors import TensorSource


def round_to_nearest(checkpoint: Checkpoint, options: QuantizeOptions) -> Checkpoint:
    """The checkpoint with its decoder's linear layers rounded as they are read; nothing is read here.

    Raises:
        CheckpointError: it is quantised already.
        InputError: a layer's size does not suit the group size.
    """
    require_float(checkpoint)
    tensors = dict(checkpoint.tensors)
    for name in decoder_linears(checkpoint.config):
        tensors[name] = rounded(tensors[name], options.weight_format)
    return with_head(replace(checkpoint, tensors=MappingProxyType(tensors)), options.head_format)


def with_head(checkpoint: Checkpoint, form: WeightFormat | None) -> Checkpoint:
    """The checkpoint with its output layer in ``form``; a tied one becomes a layer of its own, rounded."""
    if form is None:
        return checkpoint
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    source = tensors[EMBED_TOKENS if config.decoder.tie_word_embeddings else LM_HEAD]
    tensors[LM_HEAD] = rounded(source, form, LM_HEAD)
    config = replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))
    return replace(checkpoint, config=config, tensors=MappingProxyType(tensors))


def rounded(source: TensorSource, form: WeightFormat, name: str | None = None) -> RoundedTensor:
    """``source`` rounded as it is read, under its own name or another.

    Raises:
        InputError: its sizes do not suit the format.
    """
    name = source.name if name is None else name
    require_form(source.shape, form, f"{source.origin}, {name!r}")
    return RoundedTensor(name, source, form)


def require_float(checkpoint: Checkpoint) -> None:
    """Refuse to quantise twice.

    Raises:
        CheckpointError: a weight of the decoder is quantised.
    """
    held = next(iter(quantized_in_decoder(checkpoint).values()), None)
    if held is not None:
        raise CheckpointError(
            f"{held.origin}: is quantised already, to {held.format.bits} bits; export it with --precision int4 and "
            "without options of quantisation, which keeps its values, or take the float checkpoint"
        )

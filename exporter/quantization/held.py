"""What a checkpoint holds quantised; torch is not imported here, since every export asks."""

from __future__ import annotations

from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import LM_HEAD
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.weight import QuantizedSource


def quantized_in_decoder(checkpoint: Checkpoint) -> dict[str, QuantizedSource]:
    """The quantised weights of the decoder by canonical name, the output layer's included.

    A tower or projector may be quantised too: those become floats in every bundle, and are not among them.
    """
    found = ((name, checkpoint.tensors.get(name)) for name in (*decoder_linears(checkpoint.config), LM_HEAD))
    return {name: source for name, source in found if isinstance(source, QuantizedSource)}

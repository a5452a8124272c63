"""transformers' Llama layer by layer and answer by answer: for models larger than memory, and for greedy truth."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llava_deploy.engines.errors import OptionError
from llava_deploy.exporter.config import DecoderConfig
from llava_deploy.exporter.reference.torch_model import fill, llama_config
from llava_deploy.exporter.sources.tensors import TensorSource


@dataclass(frozen=True)
class GreedyAnswer:
    """The tokens of an answer, its stop token included where it came to one.

    Attributes:
        token_ids: the likeliest one each time.
        logits: float32 ``[tokens, vocab]``, what each was chosen from.
    """

    token_ids: tuple[int, ...]
    logits: torch.Tensor


def greedy_answer(
    decoder: LlamaForCausalLM, embeds: torch.Tensor, stop_token_ids: Sequence[int], most: int
) -> GreedyAnswer:
    """What transformers' ``generate`` answers to a spliced prompt ``[1, seq, hidden]``, at most ``most`` tokens."""
    stop = list(stop_token_ids)
    generating: Any = decoder  # generate's own annotations know no LlamaForCausalLM
    output = generating.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop[0] if stop else 0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return GreedyAnswer(tuple(output.sequences[0].tolist()), torch.cat(output.logits).float())


def layer_prefix(index: int) -> str:
    """What the canonical names of a layer's tensors begin with."""
    return f"language_model.layers.{index}."


def load_layer(
    config: DecoderConfig, tensors: Mapping[str, TensorSource], index: int, device: torch.device
) -> LlamaDecoderLayer:
    """transformers' layer with the checkpoint's weights, float32; it takes itself for the first one in its cache."""
    with torch.device("meta"):
        layer = LlamaDecoderLayer(llama_config(config), 0)
    fill(layer, tensors, torch.float32, lambda name: layer_prefix(index) + name)
    return layer.eval().to(device)


def require_device_name(name: str) -> None:
    """Refuse what is no device to compute on.

    Raises:
        OptionError: neither ``cpu``, ``cuda`` nor ``cuda:NUMBER``.
    """
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise OptionError("device", f"want cpu, cuda or cuda:NUMBER, got {name!r}")


def torch_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        OptionError: no such name, or PyTorch finds no such device.
    """
    require_device_name(name)
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError("device", f"want {name}, torch finds {torch.cuda.device_count()} CUDA devices; take cpu")
    return device

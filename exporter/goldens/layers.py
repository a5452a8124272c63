"""Greedy answers of a decoder that memory does not hold: one layer's weights at a time, all prompts through each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import EMBED_TOKENS, LM_HEAD
from llava_deploy.exporter.reference.torch_decoder import GreedyAnswer, load_layer
from llava_deploy.exporter.reference.torch_model import llama_config

_NORM = "language_model.norm.weight"


@dataclass(frozen=True)
class LayeredPrompt:
    """A spliced prompt, float32 ``[1, seq, hidden]``, and how many tokens its answer may have."""

    embeds: torch.Tensor
    most: int


@dataclass
class _Answering:
    """How far an answer is; ``hidden`` goes through the layers, ``[1, step, hidden]``."""

    hidden: torch.Tensor
    most: int
    caches: list[DynamicCache]
    token_ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def is_done(self, stop: Sequence[int]) -> bool:
        return len(self.token_ids) == self.most or (bool(self.token_ids) and self.token_ids[-1] in stop)


def answer_layer_by_layer(
    checkpoint: Checkpoint,
    prompts: Sequence[LayeredPrompt],
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> list[GreedyAnswer]:
    """As :func:`~llava_deploy.exporter.reference.torch_decoder.greedy_answer` of the whole decoder, answer by answer.

    Each layer is transformers' own, in a model of that layer alone, with a cache of its own; so the mask and the
    positions are what transformers makes of them, and the values are those of the whole. Memory holds a layer or the
    output layer in float32, whichever is larger, and keys and values. Every token reads all weights again.

    Args:
        checkpoint: its decoder's weights are read, and its embedding table's rows.
        prompts: taken through the layers one beside the other, each of its own length.
        device: where a layer computes.
        on_step: called after each layer of each token.
    """
    config, stop = checkpoint.config.decoder, checkpoint.chat.stop_token_ids
    layers = config.num_hidden_layers
    answers = [
        _Answering(prompt.embeds.to(device), prompt.most, [DynamicCache() for _ in range(layers)]) for prompt in prompts
    ]
    table = checkpoint.tensors[EMBED_TOKENS].read()  # [vocab, hidden]
    shell = _shell(checkpoint, device)
    while pending := [answer for answer in answers if not answer.is_done(stop)]:
        for index in range(layers):
            shell.layers[0] = load_layer(config, checkpoint.tensors, index, device)
            for answer in pending:
                cache = answer.caches[index]
                answer.hidden = shell(
                    inputs_embeds=answer.hidden, past_key_values=cache, use_cache=True
                ).last_hidden_state
            shell.layers[0] = nn.Identity()  # before the next one comes
            on_step()
        for answer, logits in zip(pending, _logits(checkpoint, pending, device), strict=True):
            token = int(logits.argmax())
            answer.logits.append(logits)
            answer.token_ids.append(token)
            answer.hidden = torch.from_numpy(np.array(table[token], np.float32))[None, None].to(device)
    return [GreedyAnswer(tuple(answer.token_ids), torch.cat(answer.logits)) for answer in answers]


def _shell(checkpoint: Checkpoint, device: torch.device) -> LlamaModel:
    """transformers' Llama with room for one layer, whose output it gives as it is."""
    config = llama_config(replace(checkpoint.config.decoder, num_hidden_layers=1))
    with torch.device("meta"):
        shell = LlamaModel(config)
    shell.embed_tokens, shell.norm = nn.Identity(), nn.Identity()
    shell.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    return shell.eval()


def _logits(checkpoint: Checkpoint, answers: Sequence[_Answering], device: torch.device) -> Iterator[torch.Tensor]:
    """After the last position of each, ``[1, vocab]``."""
    config, tensors = checkpoint.config.decoder, checkpoint.tensors

    def weight(name: str) -> nn.Parameter:
        return nn.Parameter(torch.from_numpy(tensors[name].read().astype(np.float32)).to(device), requires_grad=False)

    norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps).to(device)
    norm.weight = weight(_NORM)
    head = weight(EMBED_TOKENS if config.tie_word_embeddings else LM_HEAD)
    for answer in answers:
        yield nn.functional.linear(norm(answer.hidden)[:, -1:], head)[:, 0]

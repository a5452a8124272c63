"""The model in PyTorch as runners of Polygraphy's: they take what the graphs take and give what the graphs give."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from transformers import DynamicCache

from llava_deploy.engines.contract import GraphSpec, hidden_state_name, past_name, present_name
from llava_deploy.engines.manifest import Manifest
from llava_deploy.exporter.halves import TOWER_FEATURES
from llava_deploy.exporter.reference.torch_model import TorchLlava
from llava_deploy.runtime.backend import step_mask, step_positions

Feed = dict[str, np.ndarray]


class _TorchRunner(BaseRunner):
    def __init__(self, model: TorchLlava, spec: GraphSpec, device: str) -> None:
        super().__init__(name=f"PyTorch float32 on {device}, {spec.name}")
        self._model, self._spec, self._device = model, spec, device

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Of the graph's contract."""
        found = TensorMetadata()
        for tensor in self._spec.inputs:
            shape = [size if isinstance(size, int) else None for size in tensor.shape]
            found.add(tensor.name, np.dtype(tensor.dtype), shape)
        return found

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """Compute the graph's outputs and hidden states, float32."""
        began = time.perf_counter()
        with torch.inference_mode():
            found = self._compute(feed_dict)
            outputs = OrderedDict((name, value.float().cpu().numpy()) for name, value in found.items())
        self.inference_time = time.perf_counter() - began
        return outputs

    @abstractmethod
    def _compute(self, feed: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Outputs by their names in the graph."""

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        values = torch.tensor(array).to(self._device)
        return values.float() if values.is_floating_point() else values


class TorchVision(_TorchRunner):
    """Tower and projector."""

    def _compute(self, feed: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        states = self._model.hidden_states(self._tensor(feed["pixel_values"]))
        selected = self._model.select(states)
        named = {hidden_state_name(index): state for index, state in enumerate(states)}
        return {**named, TOWER_FEATURES: selected, "image_features": self._model.projector(selected)}


class TorchDecoder(_TorchRunner):
    """The decoder behind a cache ``[1, kv_heads, slots, head_dim]`` that is filled up to ``write_indices``."""

    def _compute(self, feed: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        decoder: Any = self._model.decoder
        filled = int(feed["write_indices"][0])
        cache = DynamicCache()
        layers = range(decoder.config.num_hidden_layers)
        for layer in layers if filled else ():
            past = (self._tensor(feed[past_name(layer, part)][:, :, :filled]) for part in ("key", "value"))
            cache.update(*past, layer)
        states: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _module, _args, out: states.append(out if out.ndim == 3 else out[0]))
            for layer in decoder.model.layers
        ]
        try:
            logits = decoder(
                inputs_embeds=self._tensor(feed["inputs_embeds"]),
                position_ids=self._tensor(feed["position_ids"]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        finally:
            for hook in hooks:
                hook.remove()
        present = {
            present_name(layer, part): values
            for layer in layers
            for part, values in (("key", cache.layers[layer].keys), ("value", cache.layers[layer].values))
        }
        named = {hidden_state_name(index): state for index, state in enumerate(states, 1)}
        return {**named, "logits": logits, **present}


def decoder_feeds(runner: TorchDecoder, manifest: Manifest, embeds: np.ndarray, token: np.ndarray) -> list[Feed]:
    """What the decoder is given: a prompt, and one token behind it, the cache as PyTorch filled it.

    Args:
        runner: gives the cache.
        manifest: of the bundle.
        embeds: ``[1, seq, hidden]``, the prompt.
        token: ``[1, 1, hidden]``.
    """
    shape, seq = manifest.decoder, embeds.shape[1]
    slots = seq + 8
    names = [(layer, part) for layer in range(shape.layers) for part in ("key", "value")]
    empty = np.zeros((1, shape.kv_heads, slots, shape.head_dim), shape.dtype)
    prompt = _feed(embeds, 0, {past_name(*name): empty for name in names})
    runner.activate()
    present = runner.infer(prompt)
    runner.deactivate()
    filled = {}
    for name in names:
        cache = empty.copy()
        cache[:, :, :seq] = present[present_name(*name)]
        filled[past_name(*name)] = cache
    return [prompt, _feed(token, seq, filled)]


def _feed(embeds: np.ndarray, at: int, past: Feed) -> Feed:
    write, seq = np.array([at]), embeds.shape[1]
    return {
        "inputs_embeds": embeds,
        "position_ids": step_positions(write, seq),
        "write_indices": write,
        "attention_mask": step_mask(write, seq),
        "last_index": np.array([seq - 1]),
        **past,
    }

"""The model in PyTorch: transformers' own CLIP and Llama, filled with the tensors that the export reads.

What the graphs are verified against. Whether the tensors are read right is another question, which the tests answer
with transformers' ``from_pretrained``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPEncoder

from llava_deploy.engines.errors import LlavaDeployError
from llava_deploy.exporter.checkpoint import Checkpoint
from llava_deploy.exporter.config import DecoderConfig, LlavaConfig, ProjectorConfig, RopeConfig, VisionConfig
from llava_deploy.exporter.halves import resolved_feature_layers
from llava_deploy.exporter.sources.tensors import TensorSource


@dataclass(frozen=True)
class TorchVision:
    """Tower and projector, on the CPU, in evaluation mode and of one dtype."""

    config: LlavaConfig
    tower: CLIPVisionModel
    projector: nn.Sequential

    def hidden_states(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[images, 3, height, width]`` to the tower's hidden states, each ``[images, 1 + patches, hidden]``."""
        states: tuple[torch.Tensor, ...] = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return states

    def select(self, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The features that go into the projector, ``[images, patches, features]``."""
        first = 1 if self.config.feature_select == "patch" else 0
        layers = resolved_feature_layers(self.config)
        return torch.cat([hidden_states[layer][:, first:] for layer in layers], dim=-1)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[images, 3, height, width]`` to what is spliced into the text, ``[images, patches, hidden]``."""
        projected: torch.Tensor = self.projector(self.select(self.hidden_states(pixel_values)))
        return projected


@dataclass(frozen=True)
class TorchLlava(TorchVision):
    """The whole model, likewise; :meth:`to` moves it to a GPU."""

    decoder: LlamaForCausalLM

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids to embeddings."""
        embedded: torch.Tensor = self.decoder.get_input_embeddings()(ids)
        return embedded

    def to(self, device: str) -> TorchLlava:
        """The model itself, its weights moved to a device by PyTorch's name of it."""
        for part in (self.tower, self.projector, self.decoder):
            part.to(torch.device(device))
        return self


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep a GPU from rounding float32 to TF32 in convolutions: without cuDNN, which does; PyTorch's own do not."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


def load_torch(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> TorchLlava:
    """Build the model; needs memory for all its weights in ``dtype``."""
    vision = load_vision(checkpoint, dtype)
    return TorchLlava(vision.config, vision.tower, vision.projector, load_decoder(checkpoint, dtype))


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Build the language model; no tensor of the tower or the projector is read."""
    with torch.device("meta"):
        decoder = LlamaForCausalLM(llama_config(checkpoint.config.decoder))
    fill(decoder, checkpoint.tensors, dtype, _decoder_name)
    return decoder.eval()


def load_vision(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> TorchVision:
    """Build the part of the model that pictures pass through; no tensor of the decoder is read."""
    config = checkpoint.config
    with torch.device("meta"):
        tower = CLIPVisionModel(_clip_config(config.vision))
        projector = _projector(config.projector)
    layers = max(resolved_feature_layers(config))
    encoder = next(module for module in tower.modules() if isinstance(module, CLIPEncoder))
    encoder.layers = encoder.layers[:layers]  # the checkpoint's left-over layers are not read
    fill(tower, checkpoint.tensors, dtype, lambda name: f"vision_tower.{name.removeprefix('vision_model.')}")
    fill(projector, checkpoint.tensors, dtype, _projector_name)
    return TorchVision(config, tower.eval(), projector.eval())


def fill(
    module: nn.Module, tensors: Mapping[str, TensorSource], dtype: torch.dtype, canonical: Callable[[str], str]
) -> None:
    """Give a module that was built on the meta device its parameters, named by ``canonical`` of the module's names."""
    module.to_empty(device="cpu")
    if isinstance(module, LlamaForCausalLM):
        module.tie_weights()  # which the way from the meta device undid
    state = {}
    for name, parameter in module.named_parameters():
        source = tensors.get(canonical(name))
        if source is None:
            if "post_layernorm" not in name:  # which no feature passes through
                raise LlavaDeployError(f"PyTorch's model wants {canonical(name)!r}, which was not read; this is a bug")
            state[name] = torch.zeros(parameter.shape, dtype=dtype)
        else:
            state[name] = torch.from_numpy(source.read().astype(np.float32)).to(dtype)
    module.load_state_dict(state, strict=False, assign=True)
    _restore_buffers(module)


def _restore_buffers(module: nn.Module) -> None:
    """Buffers that no checkpoint holds were lost on the meta device: compute them anew."""
    for child in module.modules():
        if hasattr(child, "inv_freq"):
            child.__init__(child.config)  # type: ignore[misc]
        elif hasattr(child, "position_ids") and isinstance(child.position_ids, torch.Tensor):
            child.position_ids = torch.arange(child.position_ids.shape[-1])[None]
    if isinstance(module, LlamaForCausalLM):
        module.tie_weights()


def _projector_name(name: str) -> str:
    index, part = name.split(".")
    return f"projector.{int(index) // 2}.{part}"


def _decoder_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"language_model.{name.removeprefix('model.')}"


def _projector(config: ProjectorConfig) -> nn.Sequential:
    modules: list[nn.Module] = []
    for size, following in zip(config.sizes, config.sizes[1:], strict=False):
        if modules:
            modules.append(ACT2FN[config.hidden_act])
        modules.append(nn.Linear(size, following, bias=config.bias))
    return nn.Sequential(*modules)


def _clip_config(config: VisionConfig) -> CLIPVisionConfig:
    fields = dataclasses.asdict(config)
    del fields["model_type"]
    return CLIPVisionConfig(**fields)


def llama_config(config: DecoderConfig) -> LlamaConfig:
    """transformers' config of the decoder."""
    fields = dataclasses.asdict(config)
    del fields["model_type"], fields["rope"]
    rope = _rope_parameters(config.rope)
    return LlamaConfig(**fields, rope_parameters=rope, pad_token_id=None, attn_implementation="sdpa")


def _rope_parameters(rope: RopeConfig) -> dict[str, object]:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    given = {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    return {"rope_type": rope.rope_type, "rope_theta": rope.theta, **given}

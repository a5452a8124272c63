from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_deploy.exporter.reference import LlavaLlamaConfig, LlavaLlamaForCausalLM


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def clip_config() -> CLIPVisionConfig:
    """Four patches an image; the layer before the last is not the one before the features."""
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )


@pytest.fixture
def clip_directory(clip_config: CLIPVisionConfig, tmp_path: Any) -> str:
    CLIPVisionModel(clip_config).save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


@pytest.fixture
def make_config(clip_config: CLIPVisionConfig) -> Callable[..., LlavaLlamaConfig]:
    def make(**changes: Any) -> LlavaLlamaConfig:
        fields: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            "mm_vision_config": clip_config.to_dict(),
            "mm_hidden_size": 32,
            "mm_projector_type": "mlp2x_gelu",
            "image_token_id": 63,
        }
        return LlavaLlamaConfig(**fields | changes)

    return make


@pytest.fixture
def make_model(make_config: Callable[..., LlavaLlamaConfig]) -> Callable[..., LlavaLlamaForCausalLM]:
    """Random weights, wide enough that greedy continuations vary."""

    def make(**changes: Any) -> LlavaLlamaForCausalLM:
        model = LlavaLlamaForCausalLM(make_config(**changes))
        tower = model.get_vision_tower()
        if tower is not None:
            tower.load_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        model.eval()
        return model

    return make

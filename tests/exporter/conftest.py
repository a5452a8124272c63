"""Tiny random checkpoints, written by transformers itself and then renamed to what other versions would have written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

# From the names that transformers 5.23 writes to those of each generation.
GENERATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "published": ((r"^vision_tower\.", "vision_tower.vision_model."),),
    "4.52": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    ),
    "5.23": (),
    "4.52 without vision_model": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
    "decoder of 4.52, tower as published": (
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.", "vision_tower.vision_model."),
    ),
}


@dataclass(frozen=True)
class Saved:
    """A checkpoint's directory and the transformers model that it was saved from."""

    directory: Path
    model: LlavaForConditionalGeneration

    def canonical(self) -> dict[str, torch.Tensor]:
        """The model's parameters under canonical names, without the rules for what is left out."""
        names = (
            (r"^model\.multi_modal_projector\.linear_1\.", "projector.0."),
            (r"^model\.multi_modal_projector\.linear_2\.", "projector.1."),
            (r"^model\.(vision_tower|language_model)\.", r"\1."),
        )
        return {_renamed(key, names): value for key, value in self.model.state_dict().items()}


MakeLlava = Callable[..., Saved]
Edit = Callable[[Path, Callable[[dict[str, Any]], None]], None]
Rename = Callable[[Path, tuple[tuple[str, str], ...]], None]


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    return name


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, ``<s>`` in front, and ``<image>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", len(alphabet))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def save_companions() -> Callable[[Path, int], PreTrainedTokenizerFast]:
    """Write the tokenizer and the picture settings into a checkpoint's directory."""

    def save(directory: Path, image_size: int) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(directory)
        size = {"height": image_size, "width": image_size}
        CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(directory)
        return tokenizer

    return save


@pytest.fixture
def make_llava(tmp_path: Path, save_companions: Callable[[Path, int], PreTrainedTokenizerFast]) -> MakeLlava:
    """A factory of llava-hf checkpoints: ``make_llava(vision={…}, text={…}, **top, shard="20KB")``."""

    def make(
        name: str = "checkpoint",
        *,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        shard: str = "5GB",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **top: Any,  # fields of LlavaConfig
    ) -> Saved:
        tokenizer = make_tokenizer()
        bos, eos, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<image>"))
        ids = {"vocab_size": len(tokenizer), "bos_token_id": bos, "eos_token_id": eos}
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**{**VISION, **(vision or {})}),
            text_config=LlamaConfig(**{**TEXT, **ids, **(text or {})}),
            image_token_index=image,
            **top,
        )
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.to(dtype)
        directory = tmp_path / name
        model.save_pretrained(directory, max_shard_size=shard)
        save_companions(directory, config.vision_config.image_size)
        return Saved(directory, model)

    return make


@pytest.fixture
def rename_tensors() -> Rename:
    """Rename the tensors of a one-file safetensors checkpoint, by patterns."""

    def rename(directory: Path, rules: tuple[tuple[str, str], ...]) -> None:
        path = directory / "model.safetensors"
        save_file({_renamed(key, rules): value for key, value in load_file(path).items()}, path)

    return rename


@pytest.fixture
def edit_json() -> Edit:
    """Change a JSON file in place."""

    def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return edit


@pytest.fixture
def edit_tensors() -> Edit:
    """Change the tensors of a safetensors file in place."""

    def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


@pytest.fixture(params=GENERATIONS)
def generation(request: pytest.FixtureRequest) -> tuple[tuple[str, str], ...]:
    """How each generation of the llava-hf layout renames transformers 5.23's tensors."""
    return GENERATIONS[request.param]

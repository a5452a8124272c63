"""Tiny random checkpoints, written by transformers itself and renamed to what other versions would have written."""

from __future__ import annotations

import json
import re
import shutil
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
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from llava_deploy.exporter.reference import LlavaLlamaConfig, LlavaLlamaForCausalLM

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


@dataclass(frozen=True)
class SavedOriginal:
    """A checkpoint of the original layout, its tower's directory, and the reference model."""

    directory: Path
    tower: Path
    model: LlavaLlamaForCausalLM

    def state(self) -> dict[str, torch.Tensor]:
        """The model's parameters as the original names them."""
        prefix = r"^model\.vision_tower\.vision_tower\.(?!vision_model)"
        rules = ((prefix, "model.vision_tower.vision_tower.vision_model."),)
        return {_renamed(key, rules): value for key, value in self.model.state_dict().items()}

    def canonical(self) -> dict[str, torch.Tensor]:
        """The model's parameters under canonical names, without the rules for what is left out."""
        rules = (
            (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
            (r"^model\.mm_projector\.(weight|bias)", r"projector.0.\1"),
            *((rf"^model\.mm_projector\.{2 * i}\.", f"projector.{i}.") for i in range(4)),
            (r"^model\.", "language_model."),
        )
        return {_renamed(key, rules): value for key, value in self.model.state_dict().items()}


MakeLlava = Callable[..., Saved]
MakeOriginal = Callable[..., SavedOriginal]
Edit = Callable[[Path, Callable[[dict[str, Any]], None]], None]
Rename = Callable[[Path, tuple[tuple[str, str], ...]], None]


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    return name


def _random(model: Any, seed: int) -> Any:
    """Weights large enough that each of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return model.eval()


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


@pytest.fixture(scope="session")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]:
    """Build each checkpoint once a session; every test works on a copy of its files, and leaves the model alone."""
    built: dict[str, tuple[Path, Any]] = {}

    def master(key: str, build: Callable[[Path], Any]) -> tuple[Path, Any]:
        if key not in built:
            directory = tmp_path_factory.mktemp("master")
            built[key] = (directory, build(directory))
        return built[key]

    return master


@pytest.fixture
def make_llava(tmp_path: Path, masters: Any, save_companions: Any) -> MakeLlava:
    """A factory of llava-hf checkpoints: ``make_llava(vision={…}, text={…}, shard="20KB", **of_LlavaConfig)``."""

    def build(directory: Path, shard: str, dtype: torch.dtype, seed: int, fields: dict[str, Any]) -> Any:
        tokenizer = make_tokenizer()
        bos, eos, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<image>"))
        ids = {"vocab_size": len(tokenizer), "bos_token_id": bos, "eos_token_id": eos}
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**{**VISION, **fields.pop("vision", {})}),
            text_config=LlamaConfig(**{**TEXT, **ids, **fields.pop("text", {})}),
            image_token_index=image,
            **fields,
        )
        model = _random(LlavaForConditionalGeneration(config), seed).to(dtype)
        model.save_pretrained(directory, max_shard_size=shard)
        save_companions(directory, config.vision_config.image_size)
        return model

    def make(
        name: str = "checkpoint",
        *,
        shard: str = "5GB",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **fields: Any,
    ) -> Saved:
        key = f"llava-hf {shard} {dtype} {seed} {sorted(fields.items())}"
        master, model = masters(key, lambda directory: build(directory, shard, dtype, seed, dict(fields)))
        return Saved(shutil.copytree(master, tmp_path / name), model)

    return make


@pytest.fixture
def make_original(tmp_path: Path, masters: Any, save_companions: Any, edit_json: Edit) -> MakeOriginal:
    """A factory of original-layout checkpoints, the tower beside (``tower="beside"``) or inside (``"inside"``).

    ``make_original(vision={…}, **fields_of_config_json)``.
    """

    def build(directory: Path, seed: int, fields: dict[str, Any]) -> Any:
        vision_config = CLIPVisionConfig(**{**VISION, **fields.pop("vision", {})})
        tower = directory / "tower"
        _random(CLIPVisionModel(vision_config), seed).save_pretrained(tower)
        tokenizer = save_companions(tower, vision_config.image_size)
        bos, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>"))
        multimodal = {
            "mm_vision_tower": str(tower),
            "mm_hidden_size": vision_config.hidden_size,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "use_mm_proj": True,
        }
        ids = {"vocab_size": len(tokenizer), "bos_token_id": bos, "eos_token_id": eos}
        config = LlavaLlamaConfig(**{**TEXT, **ids, **multimodal, **fields})
        model = _random(LlavaLlamaForCausalLM(config), seed + 1)
        model.get_model().get_vision_tower().load_model()
        config.save_pretrained(directory / "checkpoint")
        tokenizer.save_pretrained(directory / "checkpoint")
        return model

    def make(name: str = "original", *, tower: str = "beside", seed: int = 0, **fields: Any) -> SavedOriginal:
        key = f"llava {seed} {sorted(fields.items())}"
        master, model = masters(key, lambda directory: build(directory, seed, dict(fields)))
        directory = shutil.copytree(master / "checkpoint", tmp_path / name)
        beside = shutil.copytree(master / "tower", tmp_path / f"{name}-tower")
        edit_json(directory / "config.json", lambda values: values.update(mm_vision_tower=str(beside)))
        saved = SavedOriginal(directory, beside, model)
        tensors = {k: v for k, v in saved.state().items() if tower == "inside" or ".vision_tower." not in k}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file({key: value.clone() for key, value in tensors.items()}, directory / "model.safetensors")
        return saved

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

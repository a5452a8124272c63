"""The shipped checkpoint: small, laid out as the published ones, right about pictures it never saw, blind without."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoProcessor, CLIPImageProcessor

from llava_deploy.exporter.demo.evaluate import View, accuracy
from llava_deploy.exporter.demo.model import to_pixels
from llava_deploy.exporter.demo.scenes import KINDS, Example, Split, chance, checkpoint_dir, examples
from llava_deploy.exporter.reference import LlavaLlamaForCausalLM, from_checkpoint

PER_KIND = 60


@pytest.fixture(scope="module")
def model() -> LlavaLlamaForCausalLM:
    torch.set_num_threads(1)
    return from_checkpoint(checkpoint_dir())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_dir() / "tokenizer.json"))


@pytest.fixture(scope="module")
def unseen() -> list[Example]:
    return list(islice(examples(Split.HELD_OUT, seed=11), PER_KIND * len(KINDS)))


def test_it_is_at_most_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in checkpoint_dir().iterdir()) <= 10_000_000


def test_every_linear_of_the_decoder_takes_a_multiple_of_128() -> None:
    tensors = load_file(checkpoint_dir() / "model.safetensors")
    linears = {name: t for name, t in tensors.items() if name.startswith("language_model.") and t.ndim == 2}
    assert len(linears) == 4 * 7 + 2
    assert {tensor.shape[1] % 128 for tensor in linears.values()} == {0}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_it_has_the_published_names() -> None:
    names = set(load_file(checkpoint_dir() / "model.safetensors"))
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.k_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
    } <= names
    config = json.loads((checkpoint_dir() / "config.json").read_text())
    text = config["text_config"]
    assert config["model_type"] == "llava"
    assert 1 < text["num_key_value_heads"] < text["num_attention_heads"]


def test_the_pixels_are_those_of_its_preprocessor(unseen: list[Example]) -> None:
    pictures = [example.picture for example in unseen[:4]]
    expected = CLIPImageProcessor.from_pretrained(checkpoint_dir())(pictures, return_tensors="pt")["pixel_values"]
    one_level = 1.01 / 255 / 0.26
    assert (to_pixels(pictures) - expected).abs().max() <= one_level


def test_its_processor_puts_in_one_token_for_each_feature(unseen: list[Example]) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint_dir())
    given = processor(text="USER: <image>\nHow many objects are there? ASSISTANT:", images=[unseen[0].picture])
    config = json.loads((checkpoint_dir() / "config.json").read_text())
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    assert list(given["input_ids"][0]).count(config["image_token_index"]) == patches


def test_it_is_right_about_pictures_it_never_saw(
    model: LlavaLlamaForCausalLM, tokenizer: Tokenizer, unseen: list[Example]
) -> None:
    right = accuracy(model, tokenizer, unseen)
    assert set(right) == set(KINDS)
    assert min(right.values()) >= 0.95, right


def test_without_the_picture_it_is_at_chance(
    model: LlavaLlamaForCausalLM, tokenizer: Tokenizer, unseen: list[Example]
) -> None:
    for kind, share in accuracy(model, tokenizer, unseen, View.BLANK).items():
        # Three standard deviations of PER_KIND guesses.
        assert share <= chance(kind) + 3 * (chance(kind) * (1 - chance(kind)) / PER_KIND) ** 0.5, kind

"""Both graphs and the runtime against transformers' own LLaVA, over configurations drawn at random.

``pytest -s tests/exporter/test_parity.py`` prints the table of errors, a configuration a line.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from llava_deploy.exporter.checkpoint import CheckpointOptions, open_checkpoint
from llava_deploy.exporter.export import export
from llava_deploy.exporter.halves import DECODERS, TOWERS
from llava_deploy.exporter.reference import LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava_deploy.exporter.reference.weights import save_original
from llava_deploy.runtime import Llava

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
HF_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "defaults": {},
    "grouped heads, wide head_dim": {"text": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}},
    "one key head, tied embeddings": {
        "text": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "top": {"tie_word_embeddings": True},
    },
    "all biases, linear rope": {
        "text": {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    },
    "llama3 rope, no projector bias": {
        "text": {"rope_parameters": LLAMA3},
        "top": {"multimodal_projector_bias": False},
    },
    "two feature layers, cls kept": {
        "top": {"vision_feature_layer": [-3, -1], "vision_feature_select_strategy": "full"},
    },
    "first feature layer, gelu tower": {
        "vision": {"hidden_act": "gelu"},
        "top": {"vision_feature_layer": 1, "projector_hidden_act": "gelu_pytorch_tanh"},
    },
    "patches do not fill the picture": {
        "vision": {"image_size": 30, "patch_size": 7, "hidden_act": "gelu_pytorch_tanh"}
    },
    "gelu decoder, other rope base": {
        "text": {"hidden_act": "gelu", "rope_parameters": {"rope_type": "default", "rope_theta": 250.0}},
    },
}
ORIGINAL_CASES: dict[str, dict[str, Any]] = {
    "original, linear projector": {"mm_projector_type": "linear"},
    "original, mlp3x_gelu, cls kept": {"mm_projector_type": "mlp3x_gelu", "mm_vision_select_feature": "cls_patch"},
    "original, identity projector": {"mm_projector_type": "identity"},
}
SaveCompanions = Callable[[Path, int], PreTrainedTokenizerFast]
TOLERANCE = 1e-4
NEW_TOKENS = 64
PROMPT = "What is <image> this?"


def report(line: str) -> None:
    sys.stdout.write(f"\n{line}\n")


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every path matter: the usual 0.02 leaves a tiny model almost linear."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)


def vision_config(rng: random.Random, overrides: dict[str, Any]) -> CLIPVisionConfig:
    heads = rng.choice((2, 4))
    sizes = {
        "hidden_size": heads * rng.choice((8, 12)),
        "intermediate_size": rng.choice((40, 64)),
        "num_hidden_layers": rng.choice((3, 4)),
        "num_attention_heads": heads,
        "image_size": rng.choice((24, 32)),
        "patch_size": 8,
    }
    return CLIPVisionConfig(**{**sizes, **overrides})


def text_fields(rng: random.Random, vocab: int, overrides: dict[str, Any]) -> dict[str, Any]:
    heads = rng.choice((2, 4))
    sizes = {
        "hidden_size": heads * rng.choice((8, 16)),
        "intermediate_size": rng.choice((48, 72)),
        "num_hidden_layers": rng.choice((2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return {**sizes, **overrides}


@pytest.fixture(params=HF_CASES)
def hf_case(
    request: pytest.FixtureRequest, tmp_path: Path, save_companions: SaveCompanions
) -> tuple[str, LlavaForConditionalGeneration, Path]:
    """A saved checkpoint and the model that it was saved from."""
    case, rng = HF_CASES[request.param], random.Random(request.param)
    vision = vision_config(rng, case.get("vision", {}))
    tokenizer = save_companions(tmp_path / "checkpoint", vision.image_size)
    text = LlamaConfig(**text_fields(rng, len(tokenizer), case.get("text", {})))
    top = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **case.get("top", {})}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, **top)
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model, rng.randrange(1 << 30))
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "checkpoint")
    return request.param, model, tmp_path / "checkpoint"


def picture(seed: int, size: tuple[int, int] = (50, 41)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def test_against_transformers(hf_case: tuple[str, LlavaForConditionalGeneration, Path], tmp_path: Path) -> None:
    """Features, logits and 64 greedy tokens of a batch with ragged lengths, each row equal to transformers alone."""
    name, model, directory = hf_case
    checkpoint = open_checkpoint(directory, CheckpointOptions())
    export(checkpoint, tmp_path / "bundle", "fp32")
    llava = Llava.load(tmp_path / "bundle", threads=1)
    processor = CLIPImageProcessor.from_pretrained(directory)
    prompts = [PROMPT, "Two <image><image> pictures, and more text than the other row has."]
    images = [[picture(1)], [picture(2), picture(3, (33, 64))]]
    answers = llava.generate(prompts, images, max_new_tokens=NEW_TOKENS)
    feature_error = logit_error = 0.0
    for prompt, row, answer in zip(prompts, images, answers, strict=True):
        pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in row])
        features = image_features(model, pixels)
        found = llava.encoder.encode([prompt], [row], llava.max_len)
        got = llava.encoder.vision.encode(pixels.numpy())
        feature_error = max(feature_error, float(np.abs(got - features).max()))
        ids = input_ids(directory, prompt, features.shape[1])
        wanted = model.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        assert answer.token_ids == tuple(wanted.sequences[0, ids.shape[1] :].tolist())
        for pieces in (
            [found.tokens.lengths[0]],
            [3, 1, int(found.tokens.lengths[0]) - 4],
            [1] * int(found.tokens.lengths[0]),
        ):
            got = logits_in_pieces(llava, found.tokens.inputs_embeds, pieces)
            logit_error = max(logit_error, float(np.abs(got - wanted.logits[0].numpy()).max()))
    report(f"| {name} | {feature_error:.1e} | {logit_error:.1e} | {NEW_TOKENS} of {NEW_TOKENS}, 2 rows |")
    assert feature_error < TOLERANCE
    assert logit_error < TOLERANCE


def test_ragged_batch_equals_rows_alone(
    hf_case: tuple[str, LlavaForConditionalGeneration, Path], tmp_path: Path
) -> None:
    _, _, directory = hf_case
    export(open_checkpoint(directory, CheckpointOptions()), tmp_path / "bundle", "fp32")
    llava = Llava.load(tmp_path / "bundle", threads=1)
    prompts = ["a", "What is <image> this?", "no picture but a much longer text in this row, longer than the others"]
    images = [[], [picture(5)], []]
    together = llava.generate(prompts, images, max_new_tokens=12)
    for prompt, row, answer in zip(prompts, images, together, strict=True):
        assert llava.generate([prompt], [row], max_new_tokens=12)[0].token_ids == answer.token_ids


def image_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> np.ndarray:
    """``[images, patches, hidden]``, whatever this version of transformers wraps them in."""
    with torch.no_grad():
        output = model.get_image_features(pixel_values=pixels)
    output = getattr(output, "pooler_output", output)
    return (output if isinstance(output, torch.Tensor) else torch.stack(list(output))).numpy()


def input_ids(directory: Path, prompt: str, patches: int) -> torch.Tensor:
    """As LlavaProcessor makes them: the placeholder stands once for each feature row."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return tokenizer(prompt.replace("<image>", "<image>" * patches), return_tensors="pt").input_ids


def logits_in_pieces(llava: Llava, embeds: np.ndarray, pieces: list[int]) -> np.ndarray:
    llava.decoder.begin(1)
    at, logits = 0, np.empty(0)
    for size in map(int, pieces):
        logits = llava.decoder.step(embeds[:, at : at + size], np.array([at]), np.array([size - 1]))
        at += size
    return logits[0]


@pytest.mark.parametrize("name", ORIGINAL_CASES)
def test_original_layout_against_the_reference(name: str, tmp_path: Path, save_companions: SaveCompanions) -> None:
    """Projectors that only the original layout can say, with the tower beside the checkpoint."""
    rng = random.Random(name)
    vision = vision_config(rng, {})
    tokenizer = save_companions(tmp_path / "tower", vision.image_size)
    tower = CLIPVisionModel(vision)
    randomise(tower, 1)
    tower.save_pretrained(tmp_path / "tower")
    fields = text_fields(rng, len(tokenizer), {})
    if ORIGINAL_CASES[name]["mm_projector_type"] == "identity":
        fields["hidden_size"] = vision.hidden_size
        fields["num_attention_heads"] = fields["num_key_value_heads"] = vision.num_attention_heads
    multimodal = {
        "mm_vision_tower": str(tmp_path / "tower"),
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "use_mm_proj": True,
        **ORIGINAL_CASES[name],
    }
    model = LlavaLlamaForCausalLM(LlavaLlamaConfig(**fields, **multimodal)).eval()
    model.get_vision_tower().load_model()
    randomise(model, 2)
    model.get_vision_tower().vision_tower.load_state_dict(tower.state_dict())
    save_original(model, tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint", CheckpointOptions(vision_tower=tmp_path / "tower"))
    export(checkpoint, tmp_path / "bundle", "fp32")
    llava = Llava.load(tmp_path / "bundle", threads=1)
    image = picture(7)
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "tower")(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.encode_images(pixels).numpy()
    feature_error = float(np.abs(llava.encoder.vision.encode(pixels.numpy()) - features).max())
    ids = torch.tensor([[tokenizer.bos_token_id, 5, 9, -200, 7, 30, 31]])
    with torch.no_grad():
        wanted = model.generate(ids, images=pixels, attention_mask=torch.ones_like(ids), do_sample=False,
                                max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
                                pad_token_id=0)  # fmt: skip
    text = tokenizer.decode([5, 9]) + "<image>" + tokenizer.decode([7, 30, 31])
    answer = llava.generate([text], [[image]], max_new_tokens=NEW_TOKENS)[0]
    found = llava.encoder.encode([text], [[image]], llava.max_len)
    length, logit_error = int(found.tokens.lengths[0]), 0.0
    for pieces in ([length], [3, 1, length - 4], [1] * length):
        got = logits_in_pieces(llava, found.tokens.inputs_embeds, pieces)
        logit_error = max(logit_error, float(np.abs(got - wanted.logits[0].numpy()).max()))
    report(f"| {name} | {feature_error:.1e} | {logit_error:.1e} | {NEW_TOKENS} of {NEW_TOKENS} |")
    assert feature_error < TOLERANCE
    assert logit_error < TOLERANCE
    assert answer.token_ids == tuple(wanted.sequences[0, -NEW_TOKENS:].tolist())


def test_nothing_is_registered_without_a_parity_case() -> None:
    """A new tower or decoder brings its configurations into this file: these are the types of those above."""
    rng = random.Random(0)
    visions = {vision_config(rng, case.get("vision", {})).model_type for case in HF_CASES.values()}
    texts = {LlamaConfig(**text_fields(rng, 300, case.get("text", {}))).model_type for case in HF_CASES.values()}
    assert (set(TOWERS), set(DECODERS)) == (visions, texts)

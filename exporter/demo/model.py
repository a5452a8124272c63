"""The tiny LLaVA before training: its sizes, its first weights, and what lies beside the weights in its checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from llava_deploy.exporter.demo.tokens import BOS, EOS, IMAGE, LONGEST, PAD, VOCABULARY, save_tokenizer
from llava_deploy.exporter.reference import CLIPVisionTower, LlavaLlamaConfig, LlavaLlamaForCausalLM, save_hf

IMAGE_SIZE = 96
PATCH = 16
GRID = IMAGE_SIZE // PATCH  # patches along an edge: two for each cell of a scene
VISION_HIDDEN = 128
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


def build_model(tokenizer: Tokenizer) -> LlavaLlamaForCausalLM:
    """The untrained model, every weight trainable; seed torch first.  Every linear's input is a multiple of 128."""
    config = LlavaLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=LONGEST,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        tie_word_embeddings=False,
        image_token_id=tokenizer.token_to_id(IMAGE),
        use_mm_proj=True,
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=VISION_HIDDEN,
        tokenizer_model_max_length=LONGEST,
        mm_vision_config={
            "hidden_size": VISION_HIDDEN,
            "intermediate_size": 4 * VISION_HIDDEN,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "hidden_act": "quick_gelu",
            "projection_dim": VISION_HIDDEN,
        },
    )
    model = LlavaLlamaForCausalLM(config)
    tower = cast(CLIPVisionTower, model.get_vision_tower())
    tower.load_model()
    tower.requires_grad_(True)
    for layer in model.get_model().mm_projector.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()  # Llama's small weights would leave its GELU next to linear
    _tell_places_apart(tower)
    return model


def _tell_places_apart(tower: torch.nn.Module) -> None:
    """Start the patches' position embeddings as waves over the grid.

    CLIP starts them near zero, from where a tower this small needs many times the steps to find out which patches are
    neighbours.
    """
    frequencies = torch.exp(torch.linspace(math.log(0.3), math.log(3.0), VISION_HIDDEN // 4))
    ys, xs = torch.meshgrid(torch.arange(float(GRID)), torch.arange(float(GRID)), indexing="ij")
    angles = [places.flatten()[:, None] * frequencies for places in (ys, xs)]  # [patches, hidden / 4] each
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    (weight,) = (p for name, p in tower.named_parameters() if name.endswith("position_embedding.weight"))
    with torch.no_grad():
        weight[1:] = 0.5 * waves  # row 0 is the class token's


def look_for_likeness(model: LlavaLlamaForCausalLM) -> None:
    """Start every other head so that a token looks at what resembles it, and the output as the word embeddings.

    Queries and keys begin as the same projection (Trockman and Kolter, *Mimetic Initialization of Self-Attention
    Layers*, 2023).  Once image features lie near the words for what they show, " red" in a question then finds the red
    patches by itself, which a decoder this small otherwise takes thousands of steps to discover.
    """
    config = model.config
    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_model().embed_tokens.weight)
        for layer in model.get_model().layers:
            attention = layer.self_attn
            attention.k_proj.weight.normal_(std=config.hidden_size**-0.5)
            keys = attention.k_proj.weight.view(config.num_key_value_heads, config.head_dim, -1)
            queries = attention.q_proj.weight.view(config.num_key_value_heads, -1, config.head_dim, config.hidden_size)
            queries[:, ::2] += keys[:, None]


def to_pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures, all square, to pixels as CLIPImageProcessor makes them: float32 `[pictures, 3, height, width]`."""
    arrays = [np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)) for picture in pictures]
    scaled = (np.stack(arrays).astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())


def save_checkpoint(model: LlavaLlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the whole checkpoint in llava-hf layout, weights as float16; the model's own weights become float16."""
    directory.mkdir(parents=True, exist_ok=True)
    save_hf(model.half(), directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = "float16"  # as the published checkpoints call it
    _write(directory / "config.json", config)
    save_tokenizer(tokenizer, directory)
    edges = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": edges,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": PATCH,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    ids = {
        f"{name}_token_id": tokenizer.token_to_id(token) for name, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }
    for name, content in (
        ("preprocessor_config.json", preprocessor),
        ("processor_config.json", processor),
        ("generation_config.json", {"_from_model_config": True, **ids}),
    ):
        _write(directory / name, content)


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Checkpoints of any size, written to the disk as they are on the hub: llava-hf's layout, sharded safetensors, float16.

Weights are drawn once, some megabytes of a normal distribution, and every tensor repeats them from a place of its own;
so writing is as fast as the disk. Tokenizer, chat template and picture settings are the shipped model's.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_deploy.exporter.demo.scenes import checkpoint_dir

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
SHARD = 5_000_000_000  # bytes, as transformers cuts them
VISION_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
"""CLIP ViT-L."""

_POOL = 1 << 24  # values
_SPREAD = 0.02  # standard deviation


def llava(vision: dict[str, int], decoder: dict[str, int]) -> LlavaConfig:
    """A LLaVA of the llava-hf layout, of any size."""
    shipped = json.loads((checkpoint_dir() / "config.json").read_text(encoding="utf-8"))
    token = shipped["image_token_index"]
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**decoder), image_token_index=token
    )


def llava_7b(layers: int) -> LlavaConfig:
    """LLaVA-1.5-7B's, with so many decoder layers."""
    vision = dict(VISION_L, image_size=336, patch_size=14)
    decoder = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "vocab_size": 32064,
    }  # fmt: skip
    return llava(vision, decoder)


def write_checkpoint(directory: Path, config: LlavaConfig) -> int:
    """Write the checkpoint; the bytes of its weights."""
    directory.mkdir()
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlavaForConditionalGeneration(config).state_dict().items()}
    config.save_pretrained(directory)
    for name in COMPANIONS:
        shutil.copyfile(checkpoint_dir() / name, directory / name)
    recipe = json.loads((directory / COMPANIONS[2]).read_text(encoding="utf-8"))
    side = config.vision_config.image_size
    recipe |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (directory / COMPANIONS[2]).write_text(json.dumps(recipe), encoding="utf-8")

    pool = (np.random.default_rng(0).standard_normal(_POOL, np.float32) * _SPREAD).astype(np.float16)
    shards, index = list(_shards(shapes)), {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / file, shard, pool)
        index |= dict.fromkeys(shard, file)
    total = sum(map(_nbytes, shapes.values()))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and sum(map(_nbytes, shard.values())) + _nbytes(shape) > SHARD:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], pool: np.ndarray) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _nbytes(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors pads it, so that the values are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for piece in _values(name, shape, pool):
                file.write(piece.data.cast("B"))


def _values(name: str, shape: tuple[int, ...], pool: np.ndarray) -> Iterator[np.ndarray]:
    """A tensor's values, in pieces; those of norms are near 1."""
    left, start = math.prod(shape), zlib.crc32(name.encode()) % len(pool)
    shift = np.float16("norm" in name and name.endswith("weight"))
    while left:
        piece = pool[start : start + left]
        yield piece + shift if shift else piece
        left, start = left - len(piece), 0

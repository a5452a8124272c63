"""Checkpoints whose weights are drawn when they are read: a model of any size, and nothing of it on the disk.

Tokenizer, chat template and picture settings are the shipped model's, so that bundles of them load and answer; what
they answer is noise.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.config import LlavaConfig
from llava_deploy.exporter.demo.scenes import checkpoint_dir
from llava_deploy.exporter.weights import expected_tensors

_POOL = 1 << 24  # values; a larger tensor repeats them, from another one on
_SPREAD = 0.02  # standard deviation


@dataclass(frozen=True)
class DrawnTensor:
    """A float16 tensor of a normal distribution; norms' weights are near 1."""

    name: str
    key: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """As for :class:`~llava_deploy.exporter.sources.tensors.TensorSource`, like all of these."""
        return "float16"

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return 2 * math.prod(self.shape)

    @property
    def origin(self) -> str:
        """For messages."""
        return f"drawn ({self.key})"

    @property
    def files(self) -> tuple[Path, ...]:
        """None."""
        return ()

    def read(self) -> np.ndarray:
        """The values, of ``shape``; the same at every call."""
        start = zlib.crc32(self.key.encode()) % (_POOL // 2)  # no two alike: a backend may keep equal weights once
        values = np.resize(_pool(), start + math.prod(self.shape))[start:].reshape(self.shape)
        is_norm = "norm" in self.name and self.name.endswith("weight")
        return (values + np.float16(1)).astype(np.float16) if is_norm else values


@cache
def _pool() -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(_POOL, np.float32) * _SPREAD).astype(np.float16)


def llava_7b(layers: int = 32) -> LlavaConfig:
    """LLaVA-1.5-7B's config: CLIP ViT-L/14 at 336 pixels, Vicuna's decoder of ``layers`` layers."""
    config = open_checkpoint(checkpoint_dir()).config
    vision = dataclasses.replace(
        config.vision, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    decoder = dataclasses.replace(
        config.decoder, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, vocab_size=32064, max_position_embeddings=4096,
    )  # fmt: skip
    projector = dataclasses.replace(config.projector, sizes=(1024, 4096, 4096))
    return dataclasses.replace(config, vision=vision, decoder=decoder, projector=projector)


def drawn_checkpoint(config: LlavaConfig) -> Checkpoint:
    """A checkpoint of this config, every weight drawn."""
    shipped, side = open_checkpoint(checkpoint_dir()), config.vision.image_size
    tensors = {name: DrawnTensor(name, name, shape) for name, shape in expected_tensors(config).items()}
    image = dataclasses.replace(shipped.image, resize=("shortest_edge", side), crop=(side, side))
    return dataclasses.replace(
        shipped, name="drawn", config=config, tensors=MappingProxyType(tensors), image=image, left_out={}
    )

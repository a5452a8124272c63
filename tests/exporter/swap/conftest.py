"""Small models of many kinds, their weights drawn, and bundles compared file by file."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.config import LlavaConfig, RopeConfig
from llava_deploy.exporter.weights import expected_tensors

ROPES = (
    RopeConfig("default", 1e4, None, None, None, None),
    RopeConfig("linear", 1e4, 2.0, None, None, None),
    RopeConfig("llama3", 5000.0, 4.0, 1.0, 4.0, 64),
)

Changes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Drawn:
    """A tensor whose values are drawn; norms' weights are near 1."""

    name: str
    shape: tuple[int, ...]
    seed: int
    dtype: str = "float32"
    files: tuple[Path, ...] = ()

    @property
    def key(self) -> str:
        return self.name

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)

    @property
    def origin(self) -> str:
        return self.name

    def read(self) -> np.ndarray:
        drawn = np.random.default_rng([self.seed, *self.name.encode()]).standard_normal(self.shape, np.float32)
        is_norm = "norm" in self.name and self.name.endswith("weight")
        return drawn * np.float32(0.12) + np.float32(is_norm)


def small_config(config: LlavaConfig, changes: Changes) -> LlavaConfig:
    """A model of two layers; groups of 32 divide all of its sizes."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24,
        "patch_size": 8,
    }  # fmt: skip
    decoder = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    }  # fmt: skip
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **{**vision, **changes.get("vision", {})}),
        decoder=dataclasses.replace(config.decoder, **{**decoder, **changes.get("decoder", {})}),
        projector=dataclasses.replace(config.projector, **{"sizes": (32, 64, 64), **changes.get("projector", {})}),
        **changes.get("top", {}),
    )


def random_changes(rng: random.Random) -> Changes:
    """Something of everything that a config can say."""
    middle = [rng.choice((48, 64)) for _ in range(rng.randrange(3))]
    layers = rng.choice(((-2,), (-1,), (1,), (-3, -1)))
    return {
        "vision": {"hidden_act": rng.choice(("quick_gelu", "gelu")), "num_attention_heads": rng.choice((2, 4))},
        "decoder": {
            "num_key_value_heads": rng.choice((1, 2, 4)),
            "num_hidden_layers": rng.choice((1, 2)),
            "attention_bias": rng.random() < 0.5,
            "mlp_bias": rng.random() < 0.5,
            "tie_word_embeddings": rng.random() < 0.5,
            "rope": rng.choice(ROPES),
            "hidden_act": rng.choice(("silu", "gelu")),
        },
        "projector": {"sizes": (32 * len(layers), *middle, 64), "bias": rng.random() < 0.5},
        "top": {"feature_layers": layers, "feature_select": rng.choice(("patch", "cls_patch"))},
    }


MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def drawn(demo_checkpoint: Path) -> MakeCheckpoint:
    """``drawn(seed, changes)``: a small checkpoint with its own weights; equal seeds are equal weights."""
    shipped = open_checkpoint(demo_checkpoint)

    def make(seed: int = 0, changes: Changes = MappingProxyType({})) -> Checkpoint:
        config = small_config(shipped.config, changes)
        tensors = {name: Drawn(name, shape, seed) for name, shape in expected_tensors(config).items()}
        side = config.vision.image_size
        image = dataclasses.replace(shipped.image, resize=("shortest_edge", side), crop=(side, side))
        return dataclasses.replace(shipped, config=config, tensors=MappingProxyType(tensors), image=image)

    return make


@pytest.fixture
def random_config() -> Callable[[int], Changes]:
    """Changes to the small model, drawn with a seed."""
    return lambda seed: random_changes(random.Random(seed))


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a bundle by its relative path, engines left out."""

    def read(bundle: Path) -> dict[str, bytes]:
        files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if not name.startswith("engines/")}

    return read


@pytest.fixture
def with_part() -> Callable[[Checkpoint, Checkpoint, tuple[str, ...]], Checkpoint]:
    """A checkpoint with those tensors of another one whose names begin so."""

    def mixed(checkpoint: Checkpoint, other: Checkpoint, beginnings: tuple[str, ...]) -> Checkpoint:
        taken = {name: source for name, source in other.tensors.items() if name.startswith(beginnings)}
        return dataclasses.replace(checkpoint, tensors=MappingProxyType({**checkpoint.tensors, **taken}))

    return mixed

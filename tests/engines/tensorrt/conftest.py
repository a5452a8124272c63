"""Small models of every kind that is exported, their weights drawn: bundles to lower, to parse and to build."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest

from llava_deploy.engines.names import HeadPrecision, Precision, QuantizationMethod
from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.config import LlavaConfig, RopeConfig
from llava_deploy.exporter.export import export
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.plan import round_to_nearest, with_head
from llava_deploy.exporter.quantization.request import QuantizeOptions
from llava_deploy.exporter.quantization.weight import QuantizedSource, QuantizedWeight, WeightFormat
from llava_deploy.exporter.weights import expected_tensors

GROUP = 32
ACT_ORDER = WeightFormat(4, GROUP, symmetric=False, permuted=True)
SMALL: dict[str, dict[str, Any]] = {
    "vision": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    },
    "decoder": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 128,
    },
    "projector": {"sizes": (32, 64, 64)},
    "top": {},
}  # fmt: skip
LLAMA3 = RopeConfig("llama3", 5000.0, 4.0, 1.0, 4.0, 64)


def wide(size: int) -> dict[str, dict[str, Any]]:
    """One layer whose weights are most of an engine."""
    decoder = {
        "hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 1, "num_attention_heads": size // 64,
        "num_key_value_heads": size // 64, "head_dim": 64,
    }  # fmt: skip
    return {"decoder": decoder, "projector": {"sizes": (32, size, size)}}


FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "llava-1.5": {},
    "grouped heads, wide head_dim": {"decoder": {"num_key_value_heads": 2, "head_dim": 32}},
    "one key head, tied embeddings": {"decoder": {"num_key_value_heads": 1, "tie_word_embeddings": True}},
    "all biases, linear rope": {
        "decoder": {"attention_bias": True, "mlp_bias": True, "rope": RopeConfig("linear", 1e4, 2.0, None, None, None)}
    },
    "llama3 rope, gelu decoder": {"decoder": {"rope": LLAMA3, "hidden_act": "gelu"}},
    "two feature layers, cls kept": {
        "top": {"feature_layers": (-3, -1), "feature_select": "cls_patch"},
        "projector": {"sizes": (64, 64, 64)},
    },
    "first feature layer, gelu tower": {
        "vision": {"hidden_act": "gelu"},
        "projector": {"hidden_act": "gelu_pytorch_tanh", "bias": False},
        "top": {"feature_layers": (1,)},
    },
    "patches do not fill the picture": {
        "vision": {"image_size": 30, "patch_size": 7, "hidden_act": "gelu_pytorch_tanh"},
    },
    "linear projector": {"projector": {"sizes": (32, 64)}},
    "mlp3x_gelu projector": {"projector": {"sizes": (32, 64, 64, 64)}},
    "identity projector": {"projector": {"sizes": (64,)}, "vision": {"hidden_size": 64}},
    "heads without a fused kernel": {"vision": {"num_attention_heads": 4}, "decoder": {"head_dim": 8}},
    "wide": wide(512),
    "twice as wide": wide(1024),
}
"""What of the config differs from a small LLaVA-1.5: the kinds that tests/exporter/test_parity.py exports, one whose
attention TensorRT takes apart, and two whose weights are most of an engine."""


@dataclass(frozen=True)
class Stored:
    """How a bundle's weights are stored.

    Attributes:
        precision: of the bundle.
        symmetric: of int4; ``None`` where nothing is quantised.
        head: precision of the output layer.
        permuted: GPTQ's act-order.
    """

    precision: Precision
    symmetric: bool | None = None
    head: HeadPrecision = "fp16"
    permuted: bool = False


STORED: dict[str, Stored] = {
    "fp32": Stored("fp32"),
    "fp16": Stored("fp16"),
    "int4 symmetric": Stored("int4", True),
    "int4 asymmetric": Stored("int4", False),
    "int4-awq, int8 head": Stored("int4-awq", False, "int8"),
    "int4 head": Stored("int4", True, "int4"),
    "int4 act-order": Stored("int4", False, "fp16", permuted=True),
}


@dataclass(frozen=True)
class Drawn:
    """A tensor whose values are drawn from a normal distribution; norms' weights are near 1."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    files: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)

    @property
    def origin(self) -> str:
        return self.name

    def read(self) -> np.ndarray:
        drawn = np.random.default_rng([*self.key.encode()]).standard_normal(self.shape, np.float32)
        is_norm = "norm" in self.name and self.name.endswith("weight")
        return drawn * np.float32(0.12) + np.float32(is_norm)


@dataclass(frozen=True)
class DrawnPermuted(QuantizedSource):
    """A weight in int4 whose input features are in another order."""

    name: str
    key: str
    shape: tuple[int, ...]
    format: WeightFormat = ACT_ORDER
    method: ClassVar[QuantizationMethod] = "gptq"

    @property
    def origin(self) -> str:
        return self.name

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // 2

    def read_quantized(self) -> QuantizedWeight:
        rng, (columns, rows) = np.random.default_rng([*self.key.encode()]), self.shape
        groups = rows // GROUP
        data = rng.integers(0, 256, (rows, columns // 2), np.uint8)
        scales = rng.uniform(0.01, 0.04, (groups, columns)).astype(np.float16)
        zeros = rng.integers(0, 256, (groups, columns // 2), np.uint8)
        return QuantizedWeight(self.format, data, scales, zeros, rng.permutation(rows).astype(np.int64))


def small_config(config: LlavaConfig, changes: dict[str, dict[str, Any]]) -> LlavaConfig:
    parts = {name: {**fields, **changes.get(name, {})} for name, fields in SMALL.items()}
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, **parts["vision"]),
        decoder=dataclasses.replace(config.decoder, **parts["decoder"]),
        projector=dataclasses.replace(config.projector, **parts["projector"]),
        **parts["top"],
    )


def drawn_checkpoint(shipped: Checkpoint, config: LlavaConfig) -> Checkpoint:
    tensors = {name: Drawn(name, name, shape) for name, shape in expected_tensors(config).items()}
    side = config.vision.image_size
    image = dataclasses.replace(shipped.image, resize=("shortest_edge", side), crop=(side, side))
    return dataclasses.replace(shipped, config=config, tensors=MappingProxyType(tensors), image=image)


def stored_as(checkpoint: Checkpoint, stored: Stored) -> Checkpoint:
    if stored.symmetric is None:
        return checkpoint
    options = QuantizeOptions(GROUP, stored.symmetric, stored.head)
    if not stored.permuted:
        return round_to_nearest(checkpoint, options)
    tensors = dict(checkpoint.tensors)
    for name in decoder_linears(checkpoint.config):
        tensors[name] = DrawnPermuted(name, name, tensors[name].shape)
    return with_head(dataclasses.replace(checkpoint, tensors=MappingProxyType(tensors)), options.head_format)


MakeBundle = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def bundle_of(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """``bundle_of(family, stored)``: a small model as a bundle, by names of ``FAMILIES`` or ``demo`` and ``STORED``.

    Each is made once a session, and is not to be written to.
    """
    made: dict[tuple[str, str], Path] = {}

    def bundle(family: str, stored: str) -> Path:
        if (family, stored) not in made:
            checkpoint = open_checkpoint(demo_checkpoint)
            if family != "demo":
                checkpoint = drawn_checkpoint(checkpoint, small_config(checkpoint.config, FAMILIES[family]))
            path = tmp_path_factory.mktemp("network") / "bundle"
            export(stored_as(checkpoint, STORED[stored]), path, STORED[stored].precision)
            made[family, stored] = path
        return made[family, stored]

    return bundle

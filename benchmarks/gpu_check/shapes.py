"""Models to measure, made on the spot by the project's own exporter; every weight is drawn, nothing is downloaded."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from drawn_checkpoint import drawn_checkpoint, llava_7b
from names import ShapeName, Weights

from llava_deploy.engines.names import QuantizationMethod
from llava_deploy.exporter.checkpoint import Checkpoint, open_checkpoint
from llava_deploy.exporter.config import LlavaConfig
from llava_deploy.exporter.demo.scenes import checkpoint_dir
from llava_deploy.exporter.export import export
from llava_deploy.exporter.halves import decoder_linears
from llava_deploy.exporter.quantization.weight import QuantizedSource, QuantizedWeight, WeightFormat

GROUP_SIZE = 128
STEP = 0.004  # of a quantised weight: its deviation is that of the drawn floats
POOL = (1 << 22) - 3  # bytes; no multiple of a row, so that rows differ


def config_of(shape: ShapeName) -> LlavaConfig:
    """LLaVA-1.5-7B's, that of a model of 1.2 billion parameters with the same tower, or the shipped tiny model's."""
    if shape == "tiny":
        return open_checkpoint(checkpoint_dir()).config
    config = llava_7b()
    if shape == "7b":
        return config
    decoder = replace(
        config.decoder, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4,
        head_dim=64,
    )  # fmt: skip
    return replace(config, decoder=decoder, projector=replace(config.projector, sizes=(1024, 2048, 2048)))


@dataclass(frozen=True)
class DrawnNibbles(QuantizedSource):
    """A weight in 4 bits whose values are 0 in the mean: were they not, 32 layers would add up to more than fp16 holds.

    Symmetric values are -7 to 7; others 0 to 15, their zero points 7 or 8.
    """

    method: ClassVar[QuantizationMethod] = "rtn"
    name: str
    key: str
    shape: tuple[int, ...]
    format: WeightFormat

    @property
    def origin(self) -> str:
        return f"drawn ({self.key})"

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // 2

    def read_quantized(self) -> QuantizedWeight:
        """The weight; the same at every call, another for every key."""
        out_features, in_features = self.shape
        groups = in_features // GROUP_SIZE
        scales = np.full((groups, out_features), STEP, np.float16)
        symmetric = self.format.symmetric
        data = self._taken(_nibbles(-7 if symmetric else 0, 7 if symmetric else 15), in_features)
        zero_points = None if symmetric else self._taken(_nibbles(7, 8), groups)
        return QuantizedWeight(self.format, data, scales, zero_points, None)

    def _taken(self, pool: np.ndarray, rows: int) -> np.ndarray:
        """``[rows, out_features / 2]`` of the pool, over and over, from where the key says."""
        return np.resize(np.roll(pool, zlib.crc32(self.key.encode()) % POOL), (rows, self.shape[0] // 2))


@cache
def _nibbles(least: int, most: int) -> np.ndarray:
    """Pairs of values in two's complement, all equally likely: uint8 ``[POOL]``."""
    low, high = np.random.default_rng(1).integers(least, most + 1, (2, POOL), np.int8).view(np.uint8) & 15
    packed: np.ndarray = low | (high << 4)
    return packed


def drawn(shape: ShapeName, weights: Weights) -> Checkpoint:
    """A checkpoint of the shape; of int4, the decoder's linear layers are quantised, the output layer is not."""
    checkpoint = drawn_checkpoint(config_of(shape))
    if weights == "fp16":
        return checkpoint
    form = WeightFormat(4, GROUP_SIZE, symmetric=weights == "int4-symmetric", permuted=False)
    tensors = dict(checkpoint.tensors)
    for name in decoder_linears(checkpoint.config):
        tensors[name] = DrawnNibbles(name, name, tensors[name].shape, form)
    return replace(checkpoint, tensors=MappingProxyType(tensors))


def make_bundle(shape: ShapeName, weights: Weights, bundle: str) -> dict[str, Any]:
    """A part: export the shape to ``bundle``."""
    manifest = export(drawn(shape, weights), Path(bundle), "fp16" if weights == "fp16" else "int4", replace=True)
    return {
        "parameters": manifest.model.parameters,
        "bundle_bytes": sum(entry.size for entry in manifest.files),
    }

"""Layers of many sizes, packed by the tests' own packers, are (q - z) * s bit for bit; large ones unpack at once."""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llava_deploy.exporter.quantization.formats.awq import AwqPacking
from llava_deploy.exporter.quantization.formats.compressed_tensors import CompressedPacking
from llava_deploy.exporter.quantization.formats.compressed_tensors_config import Scheme, Schemes
from llava_deploy.exporter.quantization.formats.gptq import GptqPacking, ZeroPoints
from llava_deploy.exporter.quantization.formats.packed import PackedTensor, Packing
from llava_deploy.exporter.quantization.formats.tinychat import TinychatPacking
from llava_deploy.exporter.sources.tensors import open_file

KINDS = ("awq", "gptq", "gptq in words", "gptq v2", "compressed-tensors", "tinychat")
DRAWN = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opened(parts: Mapping[str, torch.Tensor], packing: Packing, directory: Path) -> PackedTensor:
    path = directory / "layer.safetensors"
    save_file({f"layer.{part}": tensor.contiguous() for part, tensor in parts.items()}, path)
    return packing.open("layer", {key.removeprefix("layer."): source for key, source in open_file(path).items()})


def scheme(group: int, *, symmetric: bool, act: bool) -> CompressedPacking:
    return CompressedPacking(Schemes((Scheme(("Linear",), group, symmetric, act),), ()))


@st.composite
def sizes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """A kind, inputs, outputs, and input features in a group."""
    kind = draw(st.sampled_from(KINDS))
    step = 64 if kind == "tinychat" else 32
    inputs = step * draw(st.integers(1, 6))
    groups = (32, 64, 128) if kind == "tinychat" else (32, 64, 96, 128, 160, 192, -1)
    group = draw(st.sampled_from([size for size in groups if inputs % size == 0]))
    outputs = 2 * draw(st.integers(1, 20)) if kind == "compressed-tensors" else 8 * draw(st.integers(1, 6))
    return kind, inputs, outputs, group


@DRAWN
@given(
    size=sizes(),
    seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    symmetric=st.booleans(),
    act=st.booleans(),
)
def test_bit_for_bit(
    packers: Any, size: tuple[str, int, int, int], seed: int, dtype: str, symmetric: bool, act: bool
) -> None:
    kind, inputs, outputs, group = size
    act = act and kind not in ("awq", "tinychat")
    if kind == "tinychat":
        dtype, symmetric = "float16", False
    layer = packers.random_layer(seed, inputs, outputs, group, dtype=dtype, symmetric=symmetric, act=act)
    stored = {
        "gptq": (ZeroPoints.LESS_ONE_EACH, packers.less_one_each),
        "gptq in words": (ZeroPoints.LESS_ONE_IN_WORDS, packers.less_one_in_words),
        "gptq v2": (ZeroPoints.AS_THEY_ARE, packers.as_it_is),
    }
    packing: Packing
    if kind == "awq":
        packing, parts = AwqPacking(group, symmetric), packers.awq(layer)
    elif kind == "tinychat":
        packing, parts = TinychatPacking(), packers.tinychat(layer)
    elif kind == "compressed-tensors":
        packing = scheme(group, symmetric=symmetric, act=act)
        parts = packers.compressed(layer, g_idx=act, symmetric=symmetric)
    else:
        zero_points, pack = stored[kind]
        packing, parts = GptqPacking(group, symmetric, act, zero_points), packers.gptq(layer, pack)
    with tempfile.TemporaryDirectory() as directory:
        source = opened(parts, packing, Path(directory))
        weight = source.read_quantized()
        wanted = layer.weight()
        assert source.shape == wanted.shape == (outputs, inputs)
        assert weight.format == source.format
        assert (weight.zero_points is None) == symmetric
        np.testing.assert_array_equal(source.read(), wanted)


@pytest.mark.parametrize("stored", list(ZeroPoints))
def test_every_zero_point_of_gptq(packers: Any, tmp_path: Path, stored: ZeroPoints) -> None:
    """0, which the first format stores as 15, and its neighbours; 8 columns in a word."""
    layer = packers.random_layer(0, 32 * 16, 16, 32)
    layer.z[:] = [[(group * (column + 1)) % 16 for column in range(16)] for group in range(16)]
    pack = {
        ZeroPoints.LESS_ONE_EACH: packers.less_one_each,
        ZeroPoints.LESS_ONE_IN_WORDS: packers.less_one_in_words,
        ZeroPoints.AS_THEY_ARE: packers.as_it_is,
    }[stored]
    source = opened(packers.gptq(layer, pack), GptqPacking(32, False, False, stored), tmp_path)
    np.testing.assert_array_equal(source.read(), layer.weight())


def test_a_known_word_of_awq(tmp_path: Path) -> None:
    """Columns 0 to 7 of one row hold 0 to 7: AutoAWQ's order makes of it 0x75316420."""
    parts = {
        "qweight": torch.full((32, 1), 0x75316420, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    source = opened(parts, AwqPacking(32, False), tmp_path)
    assert source.read().T.tolist() == [list(range(8))] * 32


def test_tinychat_takes_zero_points_from_rounded_products(packers: Any, tmp_path: Path) -> None:
    """Every float16 scale from subnormal to large, with every zero point."""
    layer = packers.random_layer(0, 64, 512, 64)
    powers = torch.exp(torch.linspace(-16.5, 8.0, 512)).half()
    layer.s[:] = powers
    for zero in range(16):
        layer.z[:] = zero
        parts = packers.tinychat(layer)
        if not torch.isfinite(parts["scaled_zeros"]).all():
            continue
        source = opened(parts, TinychatPacking(), tmp_path)
        np.testing.assert_array_equal(source.read(), layer.weight())


@pytest.mark.parametrize("kind", ["awq", "gptq", "compressed-tensors", "tinychat"])
def test_a_large_layer_unpacks_at_once(tmp_path: Path, kind: str) -> None:
    """4096 × 11008, as in a 7B model: some tenths of a second, and a few times the packed bytes."""
    inputs, outputs, group = 4096, 11008, 128
    rng = np.random.default_rng(0)

    def noise(*shape: int, dtype: Any = np.int32) -> torch.Tensor:
        info = np.iinfo(dtype)
        return torch.from_numpy(rng.integers(info.min, info.max, shape, dtype, endpoint=True))

    groups = inputs // group
    scales = torch.full((groups, outputs), 0.01, dtype=torch.float16)
    order = torch.from_numpy(rng.permutation(np.arange(inputs) // group).astype(np.int32))
    packing, parts = {
        "awq": (
            AwqPacking(group, False),
            {"qweight": noise(inputs, outputs // 8), "qzeros": noise(groups, outputs // 8), "scales": scales},
        ),
        "gptq": (
            GptqPacking(group, False, True, ZeroPoints.LESS_ONE_EACH),
            {
                "qweight": noise(inputs // 8, outputs),
                "qzeros": noise(groups, outputs // 8),
                "scales": scales,
                "g_idx": order,
            },
        ),
        "compressed-tensors": (
            scheme(group, symmetric=True, act=False),
            {"weight_packed": noise(outputs, inputs // 8), "weight_scale": scales.T.contiguous()},
        ),
        "tinychat": (
            TinychatPacking(),
            {
                "qweight": noise(outputs // 4, inputs, dtype=np.int16),
                "scales": scales,
                "scaled_zeros": -(scales.float() * 7).half(),
            },
        ),
    }[kind]
    source = opened(parts, packing, tmp_path)
    source.read_quantized()  # the file is in memory now
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        source.read_quantized()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.7, seconds
    tracemalloc.start()
    weight = source.read_quantized()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert weight.data.shape == (inputs, outputs // 2)
    assert peak < 4 * weight.data.nbytes


def test_groups_repeat_where_the_file_has_wider_ones(packers: Any, tmp_path: Path) -> None:
    for inputs, group, stored in ((512, 256, 128), (192, -1, 64), (96, 96, 32)):
        layer = packers.random_layer(0, inputs, 16, group)
        weight = opened(packers.awq(layer), AwqPacking(group, False), tmp_path).read_quantized()
        assert weight.format.group_size == stored
        assert weight.scales.shape == (inputs // stored, 16)
        np.testing.assert_array_equal(weight.dequantized(), layer.weight())

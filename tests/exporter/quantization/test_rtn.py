"""Round to nearest: held against the definition written out, value by value."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_deploy.engines.errors import CheckpointError, InputError
from llava_deploy.engines.nibbles import pack_nibbles, unpack_nibbles
from llava_deploy.exporter.quantization.rtn import quantize
from llava_deploy.exporter.quantization.weight import (
    QuantizedWeight,
    WeightFormat,
)

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def by_definition(group: np.ndarray, *, symmetric: bool) -> tuple[np.ndarray, np.float16, int]:
    """Codes, scale and zero point of one group of float32 values, one value at a time."""
    if symmetric:
        scale = np.float16(max(abs(group)) / np.float32(7))
        low, high, zero = -8, 7, 0
    else:
        least, most = min(0, *group), max(0, *group)
        scale = np.float16((np.float32(most) - np.float32(least)) / np.float32(15))
        scale = max(scale, np.finfo(np.float16).smallest_subnormal)
        low, high, zero = 0, 15, int(min(15, max(0, round(float(-least / np.float32(scale))))))
    scale = max(scale, np.finfo(np.float16).smallest_subnormal)
    codes = [min(high, max(low, round(float(value / np.float32(scale))) + zero)) for value in group]
    return np.array(codes), scale, zero


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    groups=st.integers(1, 3),
    out_features=st.sampled_from([2, 6, 300]),
    group_size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "tiny", "one sign", "zeros", "outliers"]),
)
def test_every_value_is_the_nearest(
    seed: int, groups: int, out_features: int, group_size: int, symmetric: bool, dtype: type, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out_features, groups * group_size))
    if kind == "tiny":
        weight *= 1e-7
    elif kind == "one sign":
        weight = -np.abs(weight) - 0.5
    elif kind == "zeros":
        weight[:, :group_size] = 0
    elif kind == "outliers":
        weight[rng.random(weight.shape) < 0.01] *= 1000
    weight = weight.astype(dtype)

    got = quantize(weight, WeightFormat(4, group_size, symmetric, permuted=False), "here")

    values, wide = got.values(), weight.astype(np.float32)
    for row in {0, out_features // 2, out_features - 1}:
        for group in range(groups):
            span = slice(group * group_size, (group + 1) * group_size)
            codes, scale, zero = by_definition(wide[row, span], symmetric=symmetric)
            assert got.scales[group, row] == scale
            np.testing.assert_array_equal(values[span, row], codes - zero)
    error = np.abs(got.dequantized() - wide)
    steps = np.repeat(got.scales.astype(np.float32).T, group_size, axis=1)
    assert (error <= 1.01 * steps).all()


def test_eight_bits_have_one_scale_an_output() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    got = quantize(weight, WeightFormat(8, None, symmetric=True, permuted=False), "here")
    assert got.scales.shape == (1, 6)
    assert got.data.shape == (40, 6)
    np.testing.assert_array_equal(got.scales[0], (np.abs(weight).max(axis=1) / 127).astype(np.float16))
    assert np.abs(got.dequantized() - weight).max() <= 0.51 * got.scales.max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_of_which_no_scale_can_be_made(value: float, symmetric: bool) -> None:
    weight = np.ones((4, 64), np.float32)
    weight[3, 40] = value
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*NaN, infinite or very large"):
        quantize(weight, WeightFormat(4, 32, symmetric, permuted=False), "model.safetensors (k)")


@pytest.mark.parametrize(
    ("shape", "want"), [((4, 100), "100 input features cannot be cut into groups of 32"), ((3, 64), "3 outputs")]
)
def test_sizes_that_do_not_fit(shape: tuple[int, int], want: str) -> None:
    with pytest.raises(InputError, match=want):
        quantize(np.ones(shape, np.float32), WeightFormat(4, 32, symmetric=True, permuted=False), "here")


def test_nibbles_stand_as_onnx_has_them() -> None:
    codes = np.array([[1, 2, 15, 0], [8, 7, 3, 4]], np.uint8)
    packed = pack_nibbles(codes)
    np.testing.assert_array_equal(packed, [[0x21, 0x0F], [0x78, 0x43]])
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)


@given(seed=st.integers(0, 2**32), asymmetric=st.booleans(), permuted=st.booleans())
def test_parts_stand_for_their_product(seed: int, asymmetric: bool, permuted: bool) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (64, 6), np.uint8)
    scales = rng.random((2, 6)).astype(np.float16)
    zeros = rng.integers(0, 16, (2, 6), np.uint8) if asymmetric else None
    order = rng.permutation(64) if permuted else None
    form = WeightFormat(4, 32, not asymmetric, permuted)
    stored = pack_nibbles(codes if asymmetric else (codes - 8) & 15)  # two's complement
    weight = QuantizedWeight(form, stored, scales, None if zeros is None else pack_nibbles(zeros), order)
    want = np.empty((6, 64), np.float32)
    for row in range(64):
        for column in range(6):
            zero = 8 if zeros is None else int(zeros[row // 32, column])
            at = row if order is None else order[row]
            want[column, at] = np.float32(int(codes[row, column]) - zero) * np.float32(scales[row // 32, column])
    np.testing.assert_array_equal(weight.dequantized(), want)
    assert (weight.in_features, weight.out_features) == (64, 6)

"""Scales of zero are raised to the smallest number, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.scales import RaiseZeroScales

Files = Callable[..., Path]


def symmetric(linear: type, rng: np.random.Generator, dtype: Any) -> Any:
    scales = rng.uniform(0.005, 0.02, (4, 6)).astype(dtype)
    return linear(rng.integers(0, 16, (128, 6), np.uint8), scales, None)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_group_of_zeros_stays_one_but_for_rounding(
    linear: type, linears_file: Files, run_model: Any, dtype: Any
) -> None:
    rng = np.random.default_rng(0)
    plain, zeros = symmetric(linear, rng, dtype), symmetric(linear, rng, dtype)
    zeros.scales[1, 2] = zeros.scales[3] = 0
    model = ir.external_data.load_to_model(ir.load(linears_file(plain, zeros)))
    before = model.graph.initializers["w0_scale"].const_value
    x = rng.standard_normal((2, 3, 128)).astype(dtype)
    want = run_model(model, {"x": x})
    assert RaiseZeroScales()(model).modified
    found = run_model(model, {"x": x})
    np.testing.assert_array_equal(found["y0"], want["y0"])
    bound = 2.0**-21 * np.abs(x.astype(np.float64)).sum(axis=-1, keepdims=True)
    rounding = 2.0**-10 if dtype == np.float16 else 0
    difference = np.abs(found["y1"].astype(np.float64) - want["y1"].astype(np.float64))
    assert (difference <= bound + rounding * np.abs(want["y1"].astype(np.float64))).all()
    assert model.graph.initializers["w0_scale"].const_value is before
    raised = model.graph.initializers["w1_scale"].const_value
    assert raised is not None
    assert raised.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    assert (raised.numpy() > 0).all()
    assert not RaiseZeroScales()(model).modified


def test_a_scale_below_zero_is_refused_by_name(linear: type, linears_file: Files) -> None:
    layer = symmetric(linear, np.random.default_rng(1), np.float16)
    layer.scales[2, 1] = -0.5
    with pytest.raises(ir.passes.PreconditionError, match=r"scales 'w0_scale': want none below zero, found -0\.5"):
        RaiseZeroScales()(ir.load(linears_file(layer)))

"""Scales of columns repeated in blocks: the same weights to the bit, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.column_scales import BlockColumnScales


def column_model(rows: int, columns: int, seed: int, zero_point: bool = False) -> ir.Model:
    """``y = x @ dequantized``, and the dequantized weight itself."""
    rng = np.random.default_rng(seed)
    tensors = {
        "w": rng.integers(-127, 128, (rows, columns), np.int8),
        "s": rng.uniform(0.001, 0.01, columns).astype(np.float32),
    } | ({"z": rng.integers(-9, 9, columns, np.int8)} if zero_point else {})
    constants = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in tensors.items()]
    for value in constants:
        assert value.const_value is not None
        value.shape, value.dtype = ir.Shape(value.const_value.shape.numpy()), value.const_value.dtype
    x = ir.Value(name="x", shape=ir.Shape([3, rows]), type=ir.TensorType(ir.DataType.FLOAT))
    dequantize = ir.node("DequantizeLinear", constants, {"axis": 1}, name="d")
    product = ir.node("MatMul", [x, dequantize.outputs[0]], name="p")
    names = (("y", product.outputs[0], [3, columns]), ("weight", dequantize.outputs[0], [rows, columns]))
    for name, value, shape in names:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x],
        [value for _, value, _ in names],
        nodes=[dequantize, product],
        initializers=constants,
        opset_imports={"": 24},
        name="columns",
    )
    return ir.from_proto(ir.to_proto(ir.Model(graph, ir_version=11)))


@pytest.mark.parametrize(("rows", "block"), [(64, 64), (192, 64), (128, 128), (512, 128)])
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_the_same_to_the_bit(run_model: Callable[..., Any], rows: int, block: int, seed: int) -> None:
    model = column_model(rows, 5 + seed, seed)
    feed = {"x": np.random.default_rng(seed).standard_normal((3, rows)).astype(np.float32)}
    want = run_model(model, feed)
    assert BlockColumnScales()(model).modified
    (node,) = (node for node in model.graph if node.op_type == "DequantizeLinear")
    assert (node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)) == (0, block)
    assert "s" not in model.graph.initializers
    found = run_model(model, feed)
    np.testing.assert_array_equal(found["weight"], want["weight"])
    np.testing.assert_array_equal(found["y"], want["y"])
    assert not BlockColumnScales()(model).modified


@pytest.mark.parametrize(("rows", "zero_point"), [(32, False), (96, False), (128, True)])
def test_what_is_left_as_it_is(rows: int, zero_point: bool) -> None:
    model = column_model(rows, 4, 0, zero_point)
    before = ir.to_proto(model).SerializeToString()
    assert not BlockColumnScales()(model).modified
    assert ir.to_proto(model).SerializeToString() == before

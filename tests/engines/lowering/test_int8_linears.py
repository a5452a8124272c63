"""Linear layers in 8-bit integers: near the floats, whatever their weights are made of, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_deploy.engines.lowering.int8_linears import RoundLinearsToInt8
from llava_deploy.engines.processor import has_int8_products

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="no exact products of 8-bit integers here")

FLOAT, INT8, UINT4 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT4
Run = Callable[..., dict[str, np.ndarray]]
Parts = tuple[list[ir.Value], list[ir.Node], ir.Value, np.ndarray]


def constant(name: str, values: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    tensor = ir.tensor(values, dtype=dtype, name=name)
    return ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def plain(rng: np.random.Generator, rows: int, columns: int, name: str) -> Parts:
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    weight = constant(name, values)
    return [weight], [], weight, values


def turned(rng: np.random.Generator, rows: int, columns: int, name: str) -> Parts:
    values = rng.standard_normal((columns, rows)).astype(np.float32)
    weight = constant(name, values)
    node = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{name}.turned")
    node.outputs[0].name = f"v_{name}.turned"
    return [weight], [node], node.outputs[0], values.T


def dequantized(form: str) -> Callable[..., Parts]:
    def make(rng: np.random.Generator, rows: int, columns: int, name: str) -> Parts:
        block = 32 if rows % 32 == 0 else rows
        by_column = form == "columns"
        scale = rng.uniform(0.5, 2, (columns,) if by_column else (rows // block, columns)).astype(np.float32)
        if form == "zero points":
            weight = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
            zero = rng.integers(0, 16, scale.shape).astype(np.uint8)
            values = [constant(f"{name}.zero", zero, UINT4)]
            floats = (weight - np.repeat(zero, block, 0).astype(np.float32)) * np.repeat(scale, block, 0)
            first = constant(name, weight, UINT4)
        else:
            weight = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
            values = []
            floats = weight * (scale if by_column else np.repeat(scale, block, 0))
            first = constant(name, weight)
        inputs = [first, constant(f"{name}.scale", scale), *values]
        attributes = {"axis": 1} if by_column else {"axis": 0, "block_size": block}
        node = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}.floats")
        node.outputs[0].name = f"v_{name}.floats"
        node.outputs[0].type = ir.TensorType(FLOAT)
        return inputs, [node], node.outputs[0], floats.astype(np.float32)

    return make


MAKERS: dict[str, Callable[..., Parts]] = {
    "a constant": plain,
    "a transposed constant": turned,
    "int8, a scale a column": dequantized("columns"),
    "int8 in blocks": dequantized("blocks"),
    "uint4 in blocks, zero points": dequantized("zero points"),
}


def model_of(parts: list[Parts], shape: list[int | str]) -> ir.Model:
    """A product of ``x`` with each weight."""
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(FLOAT))
    nodes, outputs, initializers = [], [], []
    for index, (constants, makers, weight, _) in enumerate(parts):
        product = ir.node("MatMul", [x, weight], name=f"product.{index}")
        product.outputs[0].name, product.outputs[0].type = f"y{index}", ir.TensorType(FLOAT)
        nodes += [*makers, product]
        outputs.append(product.outputs[0])
        initializers += constants
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 24}, name="linears")
    return ir.Model(graph, ir_version=10)


def spread(found: np.ndarray, want: np.ndarray) -> float:
    return float((found - want).std() / want.std())


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_results_are_near_the_floats(run_model: Run, kind: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = data.draw(st.sampled_from([32, 64, 96, 160]))
    leading = data.draw(st.sampled_from([(1,), (7,), (1, 1), (2, 9), (1, 33), (3, 1), (2, 3, 4)]))
    columns = data.draw(st.lists(st.integers(8, 70), min_size=1, max_size=3))
    parts = [MAKERS[kind](rng, rows, n, f"w{i}") for i, n in enumerate(columns)]
    model = model_of(parts, [*leading, rows])
    x = (rng.standard_normal((*leading, rows)) * rng.uniform(1e-3, 1e3, (*leading, 1))).astype(np.float32)
    assert RoundLinearsToInt8()(model).modified
    kinds = Counter(node.op_type for node in model.graph)
    assert (kinds["MatMulIntegerToFloat"], kinds["QuantizeLinear"], kinds["MatMul"]) == (len(parts), 1, 0)
    assert not kinds["DequantizeLinear"] + kinds["Transpose"]
    left = [value.dtype for value in model.graph.initializers.values() if value.const_value is not None]
    assert left.count(INT8) == len(parts)
    found = run_model(model, {"x": x})
    for index, (_, _, _, floats) in enumerate(parts):
        want = x.astype(np.float64) @ floats
        assert found[f"y{index}"].shape == want.shape
        # Every row has its own scale: large rows do not drown small ones.
        errors = np.abs(found[f"y{index}"] - want).reshape(-1, columns[index]).max(axis=1)
        largest = np.abs(x).reshape(-1, rows).max(axis=1)
        assert (errors <= 0.02 * np.linalg.norm(floats, axis=0).max() * largest).all()
        if x.size >= 512:
            assert (
                spread(
                    found[f"y{index}"] / np.abs(want).max(-1, keepdims=True), want / np.abs(want).max(-1, keepdims=True)
                )
                < 0.03
            )


@pytest.mark.parametrize(
    ("named", "sizes"),
    [
        (["images", 5], (3, 5)),
        (["batch", "seq"], (2, 7)),
        ([None, None], (2, 7)),
        (["batch"], (4,)),
        ([None, 3, "seq"], (2, 3, 4)),
        (None, (2, 7)),
    ],
)
def test_sizes_that_are_known_when_it_runs(run_model: Run, named: Any, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    parts = [plain(rng, 64, columns, f"w{columns}") for columns in (8, 40)]
    model = model_of(parts, [*(named or sizes), 64])
    if named is None:
        model.graph.inputs[0].shape = None
    assert RoundLinearsToInt8()(model).modified
    x = (rng.standard_normal((*sizes, 64)) * rng.uniform(1e-3, 1e3, (*sizes, 1))).astype(np.float32)
    for (*_, floats), found in zip(parts, run_model(model, {"x": x}).values(), strict=True):
        want = x @ floats
        assert found.shape == want.shape
        assert (np.abs(found - want) <= 0.02 * np.linalg.norm(floats) * np.abs(x).max(-1, keepdims=True)).all()


@pytest.mark.parametrize(("named", "expands"), [(["batch", "seq"], 1), ([None, "seq"], 3), (["batch", 7], 1)])
def test_what_rows_have_in_common_is_made_once(run_model: Run, named: Any, expands: int) -> None:
    rng = np.random.default_rng(2)
    x = ir.Value(name="x", shape=ir.Shape([*named, 64]), type=ir.TensorType(FLOAT))
    nodes, weights, value = [], [], x
    for index in range(3):
        constants, _, weight, _ = plain(rng, 64, 64, f"w{index}")
        node = ir.node("MatMul", [value, weight], name=f"n{index}")
        value = node.outputs[0]
        value.name, value.shape, value.type = f"y{index}", ir.Shape([*named, 64]), ir.TensorType(FLOAT)
        nodes.append(node)
        weights += constants
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 24}, name="chain")
    model = ir.Model(graph, ir_version=10)
    RoundLinearsToInt8()(model)
    assert [node.op_type for node in model.graph].count("Expand") == expands
    feed = rng.standard_normal((2, 7, 64)).astype(np.float32)
    want = feed @ np.linalg.multi_dot([weight.const_value.numpy() for weight in weights if weight.const_value])
    assert spread(run_model(model, {"x": feed})["y2"], want) < 0.05


def test_weights_of_eight_bits_a_column_are_taken_as_they_are(run_model: Run) -> None:
    rng = np.random.default_rng(0)
    inputs, nodes, weight, _ = dequantized("columns")(rng, 64, 16, "w")
    integers = inputs[0].const_value
    assert integers is not None
    values = np.array(integers.numpy())
    values[0] = 127  # each column has its largest
    inputs[0].const_value = ir.tensor(values, name="w")
    model = model_of([(inputs, nodes, weight, values)], [4, 64])
    RoundLinearsToInt8()(model)
    (kept,) = (value for value in model.graph.initializers.values() if value.dtype == INT8)
    assert kept.const_value is not None
    np.testing.assert_array_equal(kept.const_value.numpy(), values)


def test_rows_and_columns_of_zeros_and_numbers_that_are_none(run_model: Run) -> None:
    rng = np.random.default_rng(0)
    parts = plain(rng, 64, 8, "w")
    weight = parts[3].copy()
    weight[:, 3] = 0
    parts[0][0].const_value = ir.tensor(weight, name="w")
    model = model_of([parts], ["rows", 64])
    RoundLinearsToInt8()(model)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    x[1], x[2, 5] = 0, np.inf
    found = run_model(model, {"x": x})["y0"]
    assert (found[1] == 0).all()
    assert (found[[0, 3]][:, 3] == 0).all()
    assert not np.isfinite(found[2]).any()  # and is not taken for an answer
    np.testing.assert_allclose(found[[0, 3]], x[[0, 3]] @ weight, atol=0.05 * 8)


def test_what_is_left_as_it_is(run_model: Run) -> None:
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape([2, 64]), type=ir.TensorType(FLOAT))
    other = ir.Value(name="z", shape=ir.Shape([64, 4]), type=ir.TensorType(FLOAT))
    narrow = ir.Value(name="h", shape=ir.Shape([2, 64]), type=ir.TensorType(ir.DataType.FLOAT16))
    half = constant("half", rng.standard_normal((64, 4)).astype(np.float16))
    cube = constant("cube", rng.standard_normal((1, 64, 4)).astype(np.float32))
    pairs: list[tuple[ir.Value, ir.Value]] = [(x, other), (narrow, half), (x, cube)]
    nodes = [ir.node("MatMul", pair, name=f"n{i}") for i, pair in enumerate(pairs)]
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"y{index}"
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([x, other, narrow], outputs, nodes=nodes, initializers=[half, cube], opset_imports={"": 24})
    model = ir.Model(graph, ir_version=10)
    assert not RoundLinearsToInt8()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMul"] * 3


def test_a_weight_that_several_inputs_meet_is_there_once(run_model: Run) -> None:
    rng = np.random.default_rng(0)
    constants, _, weight, values = plain(rng, 64, 8, "w")
    inputs = [ir.Value(name=f"x{i}", shape=ir.Shape([2, 64]), type=ir.TensorType(FLOAT)) for i in range(2)]
    nodes = [ir.node("MatMul", [x, weight], name=f"n{i}") for i, x in enumerate(inputs)]
    for index, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].type = f"y{index}", ir.TensorType(FLOAT)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": 24}, name="twice")
    model = ir.Model(graph, ir_version=10)
    assert RoundLinearsToInt8()(model).modified
    assert [value.dtype for value in model.graph.initializers.values()].count(INT8) == 1
    feed: dict[str, Any] = {f"x{i}": rng.standard_normal((2, 64)).astype(np.float32) for i in range(2)}
    found = run_model(model, feed)
    for index in range(2):
        assert spread(found[f"y{index}"], feed[f"x{index}"] @ values) < 0.03

"""Fused linear layers: the same results, whatever the weights are made of, and only what belongs together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.files import lower_in_memory
from llava_deploy.engines.lowering.fused_linears import FuseLinears

Files = Callable[..., Path]


def drawn(linear: type, rng: np.random.Generator, columns: int, group: int, zeros: bool, dtype: Any) -> Any:
    scales = rng.uniform(0.005, 0.02, (128 // group, columns)).astype(dtype)
    points = rng.integers(0, 16, scales.shape, np.uint8) if zeros else None
    return linear(rng.integers(0, 16, (128, columns), np.uint8), scales, points)


def with_users(path: Path) -> ir.Model:
    """The model, its results behind another operator: a product that is a result of the graph is not fused."""
    model = ir.external_data.load_to_model(ir.load(path))
    for index, value in enumerate(list(model.graph.outputs)):
        name, node = str(value.name), ir.node("Neg", [value])
        value.name = f"{name}.product"
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
        model.graph.append(node)
        model.graph.outputs[index] = node.outputs[0]
    return model


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("seed", range(3))
def test_results_are_the_same(
    linear: type, linears_file: Files, run_model: Any, dtype: Any, zeros: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    columns = [2 * int(n) for n in rng.integers(1, 20, rng.integers(2, 5))]
    model = with_users(linears_file(*(drawn(linear, rng, n, 32, zeros, dtype) for n in columns)))
    x = rng.standard_normal((2, 3, 128)).astype(dtype)
    want = run_model(model, {"x": x})
    assert FuseLinears()(model).modified
    assert operators(model) == {"DequantizeLinear": 1, "MatMul": 1, "Split": 1, "Neg": len(columns)}
    assert len(model.graph.initializers) == 2 + zeros + 1  # and the sizes of the parts
    found = run_model(model, {"x": x})
    for name, value in want.items():
        bound = 1e-3 if dtype == np.float16 else 1e-6
        np.testing.assert_allclose(found[name], value, rtol=0, atol=bound * float(np.abs(value).max()))
    assert {f"y{i}.product" for i in range(len(columns))} <= {v.name for n in model.graph for v in n.outputs}
    assert not FuseLinears()(model).modified


def test_only_what_is_of_one_kind_is_put_together(linear: type, linears_file: Files, run_model: Any) -> None:
    rng = np.random.default_rng(0)
    kinds = [(32, True), (64, True), (32, False), (32, True), (64, True)]
    model = with_users(linears_file(*(drawn(linear, rng, 8, group, zeros, np.float32) for group, zeros in kinds)))
    x = rng.standard_normal((1, 2, 128)).astype(np.float32)
    want = run_model(model, {"x": x})
    assert FuseLinears()(model).modified
    assert operators(model) == {"DequantizeLinear": 3, "MatMul": 3, "Split": 2, "Neg": 5}
    found = run_model(model, {"x": x})
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("columns", [(8, 7), (8,)])
def test_what_is_left_as_it_is(columns: tuple[int, ...]) -> None:
    x = ir.Value(name="x", shape=ir.Shape([2, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, constants, results = [], [], []
    for index, n in enumerate(columns):
        packed = ir.PackedTensor(np.zeros((64 * n + 1) // 2, np.uint8), ir.DataType.INT4, shape=ir.Shape([64, n]))
        pair = []
        for name, tensor in (("w", packed), ("s", ir.tensor(np.ones((2, n), np.float32)))):
            value = ir.Value(name=f"{name}{index}", const_value=tensor, shape=ir.Shape(tensor.shape.numpy()))
            value.dtype = tensor.dtype
            pair.append(value)
        dequantize = ir.node("DequantizeLinear", pair, {"axis": 0, "block_size": 32})
        product = ir.node("MatMul", [x, dequantize.outputs[0]])
        last = ir.node("Neg", [product.outputs[0]])
        nodes += [dequantize, product, last]
        constants += pair
        results.append(last.outputs[0])
    graph = ir.Graph([x], results, nodes=nodes, initializers=constants, opset_imports={"": 24}, name="odd")
    assert not FuseLinears()(ir.Model(graph, ir_version=11)).modified


def test_products_that_are_results_of_the_graph_stay(linear: type, linears_file: Files) -> None:
    rng = np.random.default_rng(1)
    path = linears_file(*(drawn(linear, rng, 8, 32, True, np.float32) for _ in range(2)))
    assert not FuseLinears()(ir.load(path)).modified


def test_computed_weights_go_to_the_named_file(linear: type, linears_file: Files, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    layers = [drawn(linear, rng, 8, 32, True, np.float32) for _ in range(2)]
    source = linears_file(*layers)
    model = with_users(source)
    ir.save(model, source.with_name("users.onnx"), external_data="users.data")
    computed = source.parent / "below" / "computed"
    computed.parent.mkdir()
    lowered = lower_in_memory(source.with_name("users.onnx"), [FuseLinears()], computed)
    path = source.with_name("lowered.onnx")
    path.write_bytes(lowered)
    tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
    places = {tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    assert places == {"below/computed"}
    weight = next(tensor for tensor in tensors if tensor is not None and tensor.dtype == ir.DataType.UINT4
                  and tensor.shape.numpy()[0] == 128)  # fmt: skip
    np.testing.assert_array_equal(weight.numpy().astype(int), np.hstack([layer.values for layer in layers]))

"""Products with transposed constants: the same numbers, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.transposed_weights import FuseTransposedWeights

HIDDEN = 24


def products(dtype: Any, outputs: tuple[int, ...], *, shares: bool = False, constant: bool = True) -> ir.Model:
    """``y{i} = x @ transpose(w{i})``; ``shares``: of one transposed weight; one that is no constant is an input."""
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    rng = np.random.default_rng(len(outputs))
    x = ir.Value(name="x", shape=ir.Shape(["batch", "seq", HIDDEN]), type=ir.TensorType(kind))
    nodes, weights, results = [], [], []
    turned = None
    for i, size in enumerate(outputs):
        if turned is None or not shares:
            tensor = ir.tensor(rng.standard_normal((size, HIDDEN)).astype(dtype), name=f"w{i}")
            weight = ir.Value(name=f"w{i}", shape=tensor.shape, type=ir.TensorType(kind))
            if constant:
                weight.const_value = tensor
            turned = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"turned{i}")
            weights.append(weight)
            nodes.append(turned)
        product = ir.node("MatMul", [x, turned.outputs[0]], name=f"product{i}")
        value = product.outputs[0]
        value.name, value.shape, value.type = f"y{i}", ir.Shape(["batch", "seq", size]), ir.TensorType(kind)
        nodes.append(product)
        results.append(value)
    given = {"initializers": weights} if constant else {}
    inputs = [x] if constant else [x, *weights]
    graph = ir.Graph(inputs, results, nodes=nodes, opset_imports={"": 24}, name="products", **given)
    return ir.from_proto(ir.to_proto(ir.Model(graph, ir_version=11)))


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-5), (np.float16, 2e-3)])
@pytest.mark.parametrize("shares", [False, True])
def test_the_products_are_the_same(run_model: Callable[..., Any], dtype: Any, bound: float, shares: bool) -> None:
    model = products(dtype, (16, 16, 16) if shares else (16, 8, 40), shares=shares)
    rng = np.random.default_rng(3)
    feed = {"x": rng.standard_normal((2, 5, HIDDEN)).astype(dtype)}
    want = run_model(model, feed)
    assert FuseTransposedWeights()(model).modified
    assert [node.op_type for node in model.graph] == ["FusedMatMul"] * 3
    found = run_model(model, feed)
    assert found.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=bound * float(np.abs(values).max()))
    assert not FuseTransposedWeights()(model).modified


def test_a_weight_that_is_given_at_run_time_stays_transposed() -> None:
    model = products(np.float32, (16,), constant=False)
    assert not FuseTransposedWeights()(model).modified
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul"]


def test_a_transpose_that_turns_nothing_stays() -> None:
    model = products(np.float32, (HIDDEN,))
    model.graph[0].attributes["perm"] = ir.AttrInt64s("perm", [0, 1])
    assert not FuseTransposedWeights()(model).modified


def test_a_plain_product_stays(run_model: Callable[..., Any]) -> None:
    model = products(np.float32, (HIDDEN,))
    (turned, product) = model.graph
    product.replace_input_with(1, turned.inputs[0])
    model.graph.remove(turned, safe=True)
    assert not FuseTransposedWeights()(model).modified
    assert run_model(model, {"x": np.ones((1, 1, HIDDEN), np.float32)})["y0"].shape == (1, 1, HIDDEN)

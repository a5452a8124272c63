"""Residual sums fused with the norms that read them: the same numbers, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.skip_norms import FuseSkipNorms

HIDDEN = 24


def residual_model(dtype: Any, seed: int, epsilon: float = 1e-3) -> ir.Model:
    """``y = -norm(a + b)`` and ``z = -(a + b)``."""
    shape = ("batch", "seq", HIDDEN)
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    weight = ir.tensor(np.random.default_rng(seed).uniform(0.5, 1.5, HIDDEN).astype(dtype), name="w")
    constant = ir.Value(name="w", const_value=weight, shape=ir.Shape([HIDDEN]), type=ir.TensorType(kind))
    a, b = (ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind)) for name in "ab")
    add = ir.node("Add", [a, b], name="add")
    attributes = {"axis": -1, "epsilon": epsilon}
    normed = ir.node("RMSNormalization", [add.outputs[0], constant], attributes, name="norm")
    last = ir.node("Neg", [normed.outputs[0]])
    other = ir.node("Neg", [add.outputs[0]])
    values = {"total": add, "normed": normed, "y": last, "z": other}
    for name, node in values.items():
        value = node.outputs[0]
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(kind)
    graph = ir.Graph(
        [a, b],
        [last.outputs[0], other.outputs[0]],
        nodes=[add, normed, last, other],
        initializers=[constant],
        opset_imports={"": 24},
        name="residual",
    )
    return ir.from_proto(ir.to_proto(ir.Model(graph, ir_version=11)))


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-6), (np.float16, 4e-3)])
@pytest.mark.parametrize("seed", range(4))
def test_sum_and_norm_are_the_same(run_model: Callable[..., Any], dtype: Any, bound: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = residual_model(dtype, seed, epsilon=float(rng.choice([1e-6, 1e-2, 1.0])))
    size = (*rng.integers(1, 4, 2), HIDDEN)
    feed = {name: (rng.standard_normal(size) * 10.0 ** rng.integers(-2, 2)).astype(dtype) for name in "ab"}
    want = run_model(model, feed)
    assert FuseSkipNorms()(model).modified
    assert [node.op_type for node in model.graph] == ["SkipSimplifiedLayerNormalization", "Neg", "Neg"]
    assert {"total", "normed"} <= {value.name for node in model.graph for value in node.outputs}
    found = run_model(model, feed)
    np.testing.assert_array_equal(found["z"], want["z"])
    np.testing.assert_allclose(found["y"], want["y"], rtol=0, atol=bound * float(np.abs(want["y"]).max()))
    assert not FuseSkipNorms()(model).modified


def result(model: ir.Model) -> None:
    model.graph.outputs.append(next(node.outputs[0] for node in model.graph if node.op_type == "Add"))


def broadcast(model: ir.Model) -> None:
    model.graph.inputs[1].shape = ir.Shape(["batch", 1, HIDDEN])


def unknown(model: ir.Model) -> None:
    for value in model.graph.inputs:
        value.shape = ir.Shape([None, None, HIDDEN])


def two_axes(model: ir.Model) -> None:
    for value in model.graph.inputs:
        value.shape = ir.Shape(["rows", HIDDEN])


def half_statistics(model: ir.Model) -> None:
    (norm,) = (node for node in model.graph if node.op_type == "RMSNormalization")
    norm.attributes["stash_type"] = ir.AttrInt64("stash_type", int(ir.DataType.FLOAT16))


@pytest.mark.parametrize("change", [result, broadcast, unknown, two_axes, half_statistics])
def test_what_is_left_as_it_is(change: Callable[[ir.Model], None]) -> None:
    model = residual_model(np.float32, 0)
    change(model)
    assert not FuseSkipNorms()(model).modified

"""RMSNormalization in elementary operators: the same numbers, and what the rule does not cover by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from llava_deploy.engines.lowering.rms_norm import LowerRMSNormalization

KINDS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}
ROUNDINGS = 4


def norms(weight: np.ndarray, rank: int = 3, **attributes: Any) -> ir.Model:
    """``y = norm(x)``, and ``z = norm(y)``."""
    kind = KINDS[weight.dtype.type]
    shape = [*(f"d{i}" for i in range(rank - 1)), len(weight)]
    nodes = [
        helper.make_node("RMSNormalization", [a, "w"], [b], name=f"norm {b}", **attributes)
        for a, b in (("x", "y"), ("y", "z"))
    ]
    values = [helper.make_tensor_value_info(name, kind, shape) for name in "xyz"]
    graph = helper.make_graph(nodes, "norms", values[:1], values[1:], [onnx.numpy_helper.from_array(weight, "w")])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 257),
    rows=st.integers(1, 5),
    rank=st.integers(2, 4),
    dtype=st.sampled_from([np.float32, np.float16]),
    epsilon=st.sampled_from([None, 1e-6, 1e-5, 0.5]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**32),
)
def test_numbers_are_the_operators(
    run_model: Any, size: int, rows: int, rank: int, dtype: Any, epsilon: float | None, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((*[1] * (rank - 2), rows, size)) * scale).astype(dtype)
    weight = rng.uniform(-2, 2, size).astype(dtype)
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    model = norms(weight, rank, axis=-1, **attributes)
    want = run_model(model, {"x": x})
    assert LowerRMSNormalization()(model).modified
    found = run_model(model, {"x": x})
    # Float32's own error: sums of `size` squares, halved by the root, and some roundings; twice, as z is made of y.
    float32 = (size / 2 + ROUNDINGS) * 2.0**-24
    step = 2.0**-24 if dtype == np.float32 else 2.0**-11
    tolerance = {"y": float32 + ROUNDINGS * step, "z": 3 * (float32 + ROUNDINGS * step)}
    smallest = 0.0 if dtype == np.float32 else 2.0**-23
    for name in "yz":
        a, b = found[name].astype(np.float64), want[name].astype(np.float64)
        assert (np.abs(a - b) <= tolerance[name] * np.abs(b) + smallest).all(), name


def test_float16_does_not_overflow(run_model: Any) -> None:
    model = norms(np.ones(64, np.float16))
    LowerRMSNormalization()(model)
    found = run_model(model, {"x": np.full((1, 1, 64), 60_000, np.float16)})
    np.testing.assert_allclose(found["y"], 1.0)


def test_outputs_keep_their_names_and_shapes() -> None:
    model = norms(np.ones(8, np.float32))
    before = [(value.name, value.shape, value.dtype) for value in model.graph.outputs]
    LowerRMSNormalization()(model)
    assert [(value.name, value.shape, value.dtype) for value in model.graph.outputs] == before
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not LowerRMSNormalization()(model).modified


def other_axis(node: ir.Node) -> None:
    node.attributes["axis"] = ir.AttrInt64("axis", 1)


def other_stash(node: ir.Node) -> None:
    node.attributes["stash_type"] = ir.AttrInt64("stash_type", int(ir.DataType.FLOAT16))


def other_attribute(node: ir.Node) -> None:
    node.attributes["surprise"] = ir.AttrInt64("surprise", 1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (other_axis, "want axis -1, got 1"),
        (other_stash, "want stash_type 1, got 10"),
        (other_attribute, "it has an attribute surprise"),
    ],
)
def test_another_form_is_refused_by_name(change: Callable[[ir.Node], None], problem: str) -> None:
    model = norms(np.ones(8, np.float32))
    change(model.graph[0])
    with pytest.raises(ir.passes.PreconditionError, match=f"'norm y': RMSNormalization cannot be lowered: {problem}"):
        LowerRMSNormalization()(model)

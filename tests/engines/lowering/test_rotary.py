"""RotaryEmbedding in elementary operators: the same numbers, tables looked up once, other forms refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from llava_deploy.engines.lowering.rotary import LowerRotaryEmbedding

POSITIONS = 50
KINDS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


def rotations(heads: tuple[int, ...], head_dim: int, dtype: Any, **attributes: Any) -> ir.Model:
    """``y{i} = rotated(x{i})``, all at the same positions."""
    angles = np.arange(POSITIONS)[:, None] / 100.0 ** (np.arange(0, head_dim, 2) / head_dim)
    tables = [("cos", np.cos(angles)), ("sin", np.sin(angles))]
    nodes, inputs, outputs = [], [], []
    for i, count in enumerate(heads):
        names = [f"x{i}", "cos", "sin", "positions"]
        nodes.append(helper.make_node("RotaryEmbedding", names, [f"y{i}"], name=f"turn {i}", **attributes))
        shape = ["batch", count, "seq", head_dim]
        inputs.append(helper.make_tensor_value_info(f"x{i}", KINDS[dtype], shape))
        outputs.append(helper.make_tensor_value_info(f"y{i}", KINDS[dtype], shape))
    inputs.append(helper.make_tensor_value_info("positions", TensorProto.INT64, ["batch", "seq"]))
    weights = [onnx.numpy_helper.from_array(table.astype(dtype), name) for name, table in tables]
    graph = helper.make_graph(nodes, "rotations", inputs, outputs, weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    half=st.integers(1, 24),
    batch=st.integers(1, 3),
    seq=st.integers(1, 6),
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 2**32),
)
def test_numbers_are_the_operators(
    run_model: Any, heads: tuple[int, ...], half: int, batch: int, seq: int, dtype: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    model = rotations(heads, 2 * half, dtype)
    feed = {f"x{i}": rng.standard_normal((batch, count, seq, 2 * half)).astype(dtype) for i, count in enumerate(heads)}
    feed["positions"] = rng.integers(0, POSITIONS, (batch, seq))  # of no order, each row its own
    want = run_model(model, feed)
    assert LowerRotaryEmbedding()(model).modified
    found = run_model(model, feed)
    # Two products and a sum, each rounded, here and perhaps there.
    unit = 2.0**-24 if dtype == np.float32 else 2.0**-11
    for i in range(len(heads)):
        low, high = np.split(np.abs(feed[f"x{i}"].astype(np.float64)), 2, axis=-1)
        bound = 4 * unit * np.concatenate([low + high] * 2, axis=-1) + 2.0**-23
        assert (np.abs(found[f"y{i}"].astype(np.float64) - want[f"y{i}"].astype(np.float64)) <= bound).all()


def test_what_shares_positions_shares_the_lookup() -> None:
    model = rotations((4, 2, 4), 8, np.float32)
    LowerRotaryEmbedding()(model)
    found = Counter(node.op_type for node in model.graph)
    assert (found["Gather"], found["Neg"], found["Slice"], found["Mul"]) == (2, 1, 6, 6)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [value.name for value in model.graph.outputs] == ["y0", "y1", "y2"]
    assert not LowerRotaryEmbedding()(model).modified


def test_other_positions_have_a_lookup_of_their_own(run_model: Any) -> None:
    model = rotations((2, 2), 8, np.float32)
    later = ir.Value(name="later", shape=ir.Shape(["batch", "seq"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(later)
    model.graph[1].replace_input_with(3, later)
    rng = np.random.default_rng(0)
    feed = {f"x{i}": rng.standard_normal((1, 2, 3, 8)).astype(np.float32) for i in range(2)}
    feed |= {"positions": np.array([[1, 2, 3]]), "later": np.array([[7, 8, 9]])}
    want = run_model(model, feed)
    LowerRotaryEmbedding()(model)
    found = run_model(model, feed)
    for name, values in want.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)


def interleaved(node: ir.Node) -> None:
    node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def partial(node: ir.Node) -> None:
    node.attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", 4)


def short_table(node: ir.Node) -> None:
    assert node.inputs[1] is not None
    node.inputs[1].shape = ir.Shape([POSITIONS, 2])


def flat(node: ir.Node) -> None:
    assert node.inputs[0] is not None
    node.inputs[0].shape = ir.Shape(["batch", "seq", 32])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (interleaved, "want interleaved 0, got 1"),
        (partial, "want rotary_embedding_dim 0, got 4"),
        (short_table, r"want tables \[positions, 4\], got \[50,2\]"),
        (flat, "want x of four axes"),
    ],
)
def test_another_form_is_refused_by_name(change: Callable[[ir.Node], None], problem: str) -> None:
    model = rotations((2,), 8, np.float32)
    change(model.graph[0])
    with pytest.raises(ir.passes.PreconditionError, match=f"'turn 0': RotaryEmbedding cannot be lowered: {problem}"):
        LowerRotaryEmbedding()(model)

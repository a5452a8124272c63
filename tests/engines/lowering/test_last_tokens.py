"""Rows are picked before what works row by row: the same numbers of fewer rows, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.last_tokens import PickLastTokensEarly

HIDDEN, WIDE = 8, 12
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
ROWS = ("batch", "seq")


class Drawn:
    """A graph that is put together node by node, with drawn constants."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def value(self, name: str, sizes: tuple[Any, ...], kind: ir.DataType = FLOAT) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(kind))

    def constant(self, *sizes: int) -> ir.Value:
        return self.of(self.rng.uniform(0.5, 1.5, sizes).astype(np.float32))

    def of(self, values: np.ndarray) -> ir.Value:
        name = f"c{len(self.constants)}"
        value = self.value(name, values.shape, ir.DataType.from_numpy(values.dtype))
        value.const_value = ir.tensor(values, name=name)
        self.constants.append(value)
        return value

    def node(self, op_type: str, *inputs: ir.Value, sizes: tuple[Any, ...], **attributes: int) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, name=f"{op_type}_{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(sizes), ir.TensorType(FLOAT)
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
        graph = ir.Graph(
            inputs, outputs, nodes=self.nodes, initializers=self.constants, opset_imports={"": 24}, name="drawn"
        )
        return ir.from_proto(ir.to_proto(ir.Model(graph, ir_version=11)))


def layer_model(seed: int, *, is_seen: bool = False) -> ir.Model:
    """A layer behind its attention, a pick of rows, and a product; ``is_seen``: its hidden state is a result, too."""
    draw, rows = Drawn(seed), (*ROWS, HIDDEN)
    hidden, attended = draw.value("hidden", rows), draw.value("attended", rows)
    last = draw.value("last", ("batch",), INT64)
    wide = (*ROWS, WIDE)
    turned = draw.node("Transpose", draw.constant(HIDDEN, HIDDEN), sizes=(HIDDEN, HIDDEN))
    shuffled = draw.node("Gather", attended, draw.of(draw.rng.permutation(HIDDEN)), sizes=rows, axis=-1)
    projected = draw.node("MatMul", shuffled, turned, sizes=rows)
    biased = draw.node("Add", projected, draw.constant(HIDDEN), sizes=rows)
    total = draw.node("Add", hidden, biased, sizes=rows)
    normed = draw.node("RMSNormalization", total, draw.constant(HIDDEN), sizes=rows, axis=-1)
    gate = draw.node("MatMul", normed, draw.constant(HIDDEN, WIDE), sizes=wide)
    act = draw.node("Mul", gate, draw.node("Sigmoid", gate, sizes=wide), sizes=wide)
    up = draw.node("MatMul", normed, draw.constant(HIDDEN, WIDE), sizes=wide)
    product = draw.node("Mul", act, up, sizes=wide)
    result = draw.node("Add", total, draw.node("MatMul", product, draw.constant(WIDE, HIDDEN), sizes=rows), sizes=rows)
    index = draw.node("Unsqueeze", last, draw.of(np.array([1])), sizes=("batch", 1))
    index.type = ir.TensorType(INT64)
    picked = draw.node("GatherND", result, index, sizes=("batch", HIDDEN), batch_dims=1)
    logits = draw.node("MatMul", picked, draw.constant(HIDDEN, WIDE), sizes=("batch", WIDE))
    outputs = [logits, total] if is_seen else [logits]
    return draw.model([hidden, attended, last], outputs)


def feed_of(seed: int, batch: int, seq: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal((batch, seq, HIDDEN)).astype(np.float32) for name in ("hidden", "attended")}
    return {**values, "last": rng.integers(0, seq, batch)}


def rows_of_products(model: ir.Model) -> list[object]:
    """The number of tokens of everything that is multiplied with a weight, but for what was picked before."""
    found = [node.outputs[0].shape for node in model.graph if node.op_type == "MatMul"]
    return [shape[1] for shape in found if shape is not None and len(shape) == 3]


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (1, 7), (3, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_picked_rows_are_the_same(run_model: Callable[..., Any], seed: int, batch: int, seq: int) -> None:
    model, feed = layer_model(seed), feed_of(seed, batch, seq)
    (want,) = run_model(model, feed).values()

    assert PickLastTokensEarly()(model).modified

    assert rows_of_products(model) == [1, 1, 1, 1]
    picks = [node for node in model.graph if node.op_type == "GatherND"]
    assert {node.inputs[0].name for node in picks} == {"hidden", "attended"}
    (found,) = run_model(ir.from_proto(ir.to_proto(model)), feed).values()
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert not PickLastTokensEarly()(model).modified


def test_what_others_want_keeps_its_rows(run_model: Callable[..., Any]) -> None:
    model, feed = layer_model(0, is_seen=True), feed_of(0, 2, 6)
    want = run_model(model, feed)

    assert PickLastTokensEarly()(model).modified

    rows = [str(size) for size in rows_of_products(model)]
    assert rows == ["seq", "1", "1", "1"]
    found = run_model(ir.from_proto(ir.to_proto(model)), feed)
    for name, values in want.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def several_each(model: ir.Model) -> None:
    node_of(model, "GatherND").inputs[0].shape = ir.Shape(["batch", 4, HIDDEN])


def without_batch(model: ir.Model) -> None:
    node_of(model, "GatherND").attributes["batch_dims"] = ir.AttrInt64("batch_dims", 0)


def computed_index(model: ir.Model) -> None:
    unsqueeze = node_of(model, "Unsqueeze")
    absolute = ir.node("Abs", [unsqueeze.inputs[0]])
    model.graph.insert_before(unsqueeze, absolute)
    unsqueeze.replace_input_with(0, absolute.outputs[0])


def result_is_seen(model: ir.Model) -> None:
    model.graph.outputs.append(node_of(model, "GatherND").inputs[0])


@pytest.mark.parametrize("change", [several_each, without_batch, computed_index, result_is_seen])
def test_what_is_left_as_it_is(change: Callable[[ir.Model], None]) -> None:
    model = layer_model(0)
    change(model)
    before = [node.op_type for node in model.graph]

    assert not PickLastTokensEarly()(model).modified
    assert [node.op_type for node in model.graph] == before


def over_tokens(model: ir.Model) -> None:
    node_of(model, "RMSNormalization").attributes["axis"] = ir.AttrInt64("axis", 1)


def of_tokens(model: ir.Model) -> None:
    node_of(model, "Gather").attributes["axis"] = ir.AttrInt64("axis", 1)


def one_for_all_tokens(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["batch", 1, HIDDEN])


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (over_tokens, [True, False, False, False]),
        (of_tokens, [False, False, False, False]),
        (one_for_all_tokens, [True, False, False, False]),
    ],
)
def test_what_looks_at_other_rows_keeps_them(change: Callable[[ir.Model], None], kept: list[bool]) -> None:
    model = layer_model(0)
    change(model)

    PickLastTokensEarly()(model)

    assert [size != 1 for size in rows_of_products(model)] == kept

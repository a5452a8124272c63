"""Inputs that no result follows from."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.unused_inputs import DropUnusedInputs


def test_only_what_nothing_reads_goes() -> None:
    used, unused, passed = (
        ir.Value(name=name, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
        for name in ("used", "unused", "passed")
    )
    node = ir.node("Neg", [used], name="negated")
    dead = ir.node("Shape", [unused], name="dead")
    graph = ir.Graph(
        [used, unused, passed], [node.outputs[0], passed], nodes=[dead, node], opset_imports={"": 24}, name="g"
    )
    model = ir.Model(graph, ir_version=10)
    assert DropUnusedInputs()(model).modified
    assert [value.name for value in model.graph.inputs] == ["used", "passed"]
    assert [node.op_type for node in model.graph] == ["Neg"]
    assert not DropUnusedInputs()(model).modified


def test_what_a_subgraph_reads_is_kept() -> None:
    condition = ir.Value(name="condition", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    inner = ir.Value(name="inner", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = ir.node("Neg", [inner], name=name)
        branches[name] = ir.AttrGraph(name, ir.Graph([], [node.outputs[0]], nodes=[node], name=name))
    choice = ir.Node("", "If", [condition], [*branches.values()], num_outputs=1, name="choice")
    graph = ir.Graph([condition, inner], [choice.outputs[0]], nodes=[choice], opset_imports={"": 24}, name="g")
    assert not DropUnusedInputs()(ir.Model(graph, ir_version=10)).modified

"""An older opset: what was compared means the same by ONNX's own definitions, and the rest is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
from onnx import defs, helper

from llava_deploy.engines.lowering.opset import SAME_MEANING, DeclareOpset
from llava_deploy.engines.tensorrt.operators import OPERATORS_10_3


@pytest.mark.parametrize("operator", SAME_MEANING)
def test_definitions_differ_in_types_and_other_attributes_only(operator: str) -> None:
    old, new = (defs.get_schema(operator, opset) for opset in (21 if operator == "DequantizeLinear" else 20, 24))
    assert [value.name for value in old.inputs] == [value.name for value in new.inputs]
    assert [value.option for value in old.inputs] == [value.option for value in new.inputs]
    assert {*old.attributes} >= SAME_MEANING[operator]
    for name in {*old.attributes} & {*new.attributes}:
        defaults = [helper.get_attribute_value(schema.attributes[name].default_value) for schema in (old, new)
                    if schema.attributes[name].default_value.name]  # fmt: skip
        assert defaults[:1] == defaults[1:] or not defaults
        assert old.attributes[name].required == new.attributes[name].required
    added = {*new.attributes} - {*old.attributes}
    assert added <= {"output_dtype", "round_mode"}  # both without effect unless they are there
    assert not added & SAME_MEANING[operator]


def test_the_release_documents_all_of_them() -> None:
    assert {*SAME_MEANING} <= {*OPERATORS_10_3}


def model(op_type: str, kind: Any = ir.DataType.FLOAT, **attributes: Any) -> ir.Model:
    value = ir.Value(name="x", shape=ir.Shape([2, 2]), type=ir.TensorType(kind))
    node = ir.node(op_type, inputs=[value], attributes=attributes, name="the node")
    node.outputs[0].name = "y"
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 24}, name="graph")
    return ir.Model(graph, ir_version=11)


def test_it_is_declared() -> None:
    made = model("Sigmoid")
    assert DeclareOpset()(made).modified
    assert (made.ir_version, made.graph.opset_imports) == (10, {"": 20})
    assert not DeclareOpset()(made).modified


def test_four_bits_need_the_next(linear: type, linears_file: Callable[..., Any]) -> None:
    import numpy as np

    made = ir.load(linears_file(linear(np.zeros((64, 4), np.uint8), np.ones((2, 4), np.float16), None)))
    DeclareOpset()(made)
    assert (made.ir_version, made.graph.opset_imports) == (10, {"": 21})


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (model("RMSNormalization"), "RMSNormalization is not for TensorRT 10.3: it is none of the operators"),
        (model("BitwiseNot", ir.DataType.INT32), "BitwiseNot is not for TensorRT 10.3: it is none of the operators"),
        (model("Cast", to=1, round_mode="up"), r"Cast is not for TensorRT 10.3: it has attributes \['round_mode'\]"),
        (model("Sigmoid", ir.DataType.DOUBLE), "its parser takes float32, float16, bfloat16, not DOUBLE"),
        (model("Add", ir.DataType.UINT8), "its parser takes float32, .* not UINT8"),
    ],
)
def test_what_is_not_for_the_release_is_refused_by_name(made: ir.Model, problem: str) -> None:
    with pytest.raises(ir.passes.PreconditionError, match=f"'the node': .*{problem}"):
        DeclareOpset()(made)


def test_another_opset_is_refused() -> None:
    made = model("Sigmoid")
    made.graph.opset_imports[""] = 25
    with pytest.raises(ir.passes.PreconditionError, match="want a graph of opset 24 without functions"):
        DeclareOpset()(made)

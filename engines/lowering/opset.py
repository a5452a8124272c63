"""An older opset on a graph that means the same in it: what TensorRT 10.3's parser was made for."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.contract import OPSET_VERSION
from llava_deploy.engines.tensorrt.operators import IR_VERSION, OPERATORS_10_3, OPSETS

_BASIC, _FOUR_BITS = OPSETS[1], 21
_TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
    ir.DataType.INT4: "int4",
    ir.DataType.BOOL: "bool",
}

SAME_MEANING: dict[str, frozenset[str]] = {
    "Add": frozenset(),
    "Cast": frozenset({"to"}),
    "Concat": frozenset({"axis"}),
    "Conv": frozenset({"kernel_shape", "strides"}),
    "DequantizeLinear": frozenset({"axis", "block_size"}),
    "Div": frozenset(),
    "Expand": frozenset(),
    "Gather": frozenset({"axis"}),
    "GatherND": frozenset({"batch_dims"}),
    "Gelu": frozenset({"approximate"}),
    "Identity": frozenset(),
    "LayerNormalization": frozenset({"axis", "epsilon"}),
    "MatMul": frozenset(),
    "Mul": frozenset(),
    "Neg": frozenset(),
    "ReduceMean": frozenset({"keepdims"}),
    "ReduceSum": frozenset({"keepdims"}),
    "Reshape": frozenset(),
    "Shape": frozenset({"start", "end"}),
    "Sigmoid": frozenset(),
    "Slice": frozenset(),
    "Softmax": frozenset({"axis"}),
    "Sqrt": frozenset(),
    "Sub": frozenset(),
    "Transpose": frozenset({"perm"}),
    "Unsqueeze": frozenset(),
    "Where": frozenset(),
}
"""Operators whose definitions in opsets 20 (``DequantizeLinear`` of 4 bits: 21) and 24 were compared, and the
attributes that mean the same in both. Later opsets add types to them, and attributes that are not listed here."""


class DeclareOpset(ir.passes.InPlacePass):
    """Opset 24 becomes 20, or 21 where a weight has 4 bits or blocks; IR version 10 at most.

    Requires: opset 24; no subgraphs and no functions; every operator is one of ONNX that TensorRT 10.3 documents for
    its data's type, and that means the same in both opsets, with the attributes it has: :data:`SAME_MEANING`.

    Ensures: opset and IR version; nothing else is changed.
    """

    def requires(self, model: ir.Model) -> None:
        """The graph means the same in both, and the release takes it."""
        if model.opset_imports.get("") not in (OPSET_VERSION, _BASIC, _FOUR_BITS) or model.functions:
            found = dict(model.opset_imports)
            raise ir.passes.PreconditionError(f"want a graph of opset {OPSET_VERSION} without functions, found {found}")
        for node in model.graph:
            problem = _problem(node)
            if problem is not None:
                raise ir.passes.PreconditionError(f"{node.name!r}: {node.op_type} is not for TensorRT 10.3: {problem}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Declare them."""
        opset = _FOUR_BITS if any(_needs_later(node) for node in model.graph) else _BASIC
        before = (dict(model.graph.opset_imports), model.ir_version)
        model.graph.opset_imports.clear()
        model.graph.opset_imports[""] = opset
        model.ir_version = min(model.ir_version or IR_VERSION, IR_VERSION)
        return ir.passes.PassResult(model, modified=before != (dict(model.graph.opset_imports), model.ir_version))

    def ensures(self, model: ir.Model) -> None:
        """They are declared."""
        if model.graph.opset_imports not in ({"": _BASIC}, {"": _FOUR_BITS}):
            raise ir.passes.PostconditionError(f"found opsets {dict(model.graph.opset_imports)}")


def _problem(node: ir.Node) -> str | None:
    if node.domain or node.op_type not in SAME_MEANING:
        return "it is none of the operators that were compared between opsets"
    types = OPERATORS_10_3.get(node.op_type)
    if types is None:
        return "its parser does not document it"
    unknown = sorted(set(node.attributes) - SAME_MEANING[node.op_type])
    if unknown:
        return f"it has attributes {unknown}"
    dtype = None if node.inputs[0] is None else node.inputs[0].dtype
    if dtype is not None and _TYPES.get(dtype) not in types:
        return f"its parser takes {', '.join(types)}, not {dtype}"
    return None


def _needs_later(node: ir.Node) -> bool:
    weight = node.inputs[0]
    four_bits = weight is not None and weight.dtype == ir.DataType.INT4
    return node.op_type == "DequantizeLinear" and (four_bits or node.attributes.get_int("block_size", 0) != 0)

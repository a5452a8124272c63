"""RMSNormalization in elementary operators, for releases of TensorRT without it (opset 23's)."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import NodeList, attribute_problem, lowered, require_gone, require_lowerable

_OPERATOR = "RMSNormalization"
_EPSILON = 1e-5  # the operator's default


class LowerRMSNormalization(ir.passes.InPlacePass):
    """``RMSNormalization(x, weight)`` over the last axis, step by step as ONNX's specification writes it.

        ``cast(x32 / sqrt(mean(x32 · x32) + epsilon)) · weight``, ``x32`` being ``x`` in float32

    Requires: ``axis`` -1 and ``stash_type`` float32, the operator's defaults; a weight of the dtype of ``x``.

    Ensures: no such operator is left. In float32 the numbers differ by the order in which squares are summed; in
    float16 the result is rounded where the specification says, after the division and after the product.
    """

    def requires(self, model: ir.Model) -> None:
        """Every one is of the form that the rule covers."""
        require_lowerable(model, _OPERATOR, _problem)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        return lowered(model, _OPERATOR, _lower)

    def ensures(self, model: ir.Model) -> None:
        """None is left, in subgraphs neither."""
        require_gone(model, _OPERATOR)


def _problem(node: ir.Node) -> str | None:
    if len(node.inputs) != 2 or len(node.outputs) != 1:
        return f"want two inputs and one output, got {len(node.inputs)} and {len(node.outputs)}"
    x, weight = node.inputs
    if x is None or weight is None or x.dtype is None or x.dtype != weight.dtype:
        return "want an input and a weight of one known dtype"
    return attribute_problem(node, axis=-1, stash_type=int(ir.DataType.FLOAT), epsilon=None)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    x, weight = (value for value in node.inputs if value is not None)
    op = NodeList(graph, str(node.name))
    wide = op.cast(x, x.dtype, ir.DataType.FLOAT)
    mean = op.add("ReduceMean", op.add("Mul", wide, wide), op.integers([-1]), keepdims=1)
    root = op.add("Sqrt", op.add("Add", mean, op.float32(node.attributes.get_float("epsilon", _EPSILON))))
    normal = op.cast(op.add("Div", wide, root), ir.DataType.FLOAT, x.dtype)
    op.take_place_of(node, op.add("Mul", normal, weight))

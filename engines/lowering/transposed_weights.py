"""Products with a transposed constant read it as it lies: ONNX Runtime's FusedMatMul in place of Transpose and MatMul.

A linear layer's weight lies as PyTorch has it, ``[out, in]``, and the canonical graph transposes it. ONNX Runtime folds
that into a second copy of every weight whenever it loads the graph, on the host: seconds and gigabytes. Libraries of
matrix products on a GPU take either order.
"""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import NodeList, constant_shape

_DOMAIN = "com.microsoft"
_TURNED = (1, 0)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class FuseTransposedWeights(ir.passes.InPlacePass):
    """``MatMul(x, Transpose(weight))`` becomes ``com.microsoft::FusedMatMul(x, weight, transB=1)``.

    Covers constants ``[out, in]`` of floats. Anything else is left as it is.

    Ensures: each product under its name, of the same numbers; weights are as they were.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        covered = [(node, turned) for node in graph if (turned := _covered_transpose(node)) is not None]
        for product, turned in covered:
            _fuse(graph, product, turned)
        if covered:
            graph.opset_imports.setdefault(_DOMAIN, 1)
        return ir.passes.PassResult(model, modified=bool(covered))


def _covered_transpose(product: ir.Node) -> ir.Node | None:
    """The transpose of the weight that a product reads, where the rule covers both."""
    if (product.domain, product.op_type) != ("", "MatMul") or None in product.inputs:
        return None
    turned = None if product.inputs[1] is None else product.inputs[1].producer()
    if turned is None or (turned.domain, turned.op_type) != ("", "Transpose"):
        return None
    if tuple(turned.attributes.get_ints("perm", _TURNED)) != _TURNED:
        return None
    weight = turned.inputs[0]
    shape = constant_shape(weight)
    is_matrix = weight is not None and weight.dtype in _FLOATS and shape is not None and len(shape) == 2
    return turned if is_matrix else None


def _fuse(graph: ir.Graph, product: ir.Node, turned: ir.Node) -> None:
    op = NodeList(graph, f"{product.name}.fused")
    inputs = [value for value in (product.inputs[0], turned.inputs[0]) if value is not None]
    op.take_place_of(product, op.add_of(_DOMAIN, "FusedMatMul", *inputs, transB=1))
    if not turned.outputs[0].uses():
        graph.remove(turned, safe=True)

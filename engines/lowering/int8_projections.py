"""Queries, keys and values in 8-bit integers become one product, which attention takes as it is.

They read one hidden state, rounded once. One product with the three weights beside each other, and one multiplication
by the rows' scales, take the place of three each; ``GroupQueryAttention`` finds its parts itself. Gate and up
projection would have to be split again behind theirs, a copy: of 233 tokens that costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import NodeList, constant_shape

_DOMAIN = "com.microsoft"
_PARTS = 3  # queries, keys, values: the operator's first inputs


class PackInt8Projections(ir.passes.InPlacePass):
    """``GroupQueryAttention`` of three products in integers becomes one of a single product.

    Covers products as :class:`~llava_deploy.engines.lowering.int8_linears.RoundLinearsToInt8` makes them, of the same
    rows, with weights and results that nothing else uses. Anything else, and attention in a subgraph, is left as it is.

    Ensures: every column of the weight, and its scale, is exactly what it was. Packed weights are computed when they
    are read, one at a time.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        found = [(node, parts) for node in graph if (parts := _parts(node)) is not None]
        for node, parts in found:
            _pack(graph, node, parts)
        return ir.passes.PassResult(model, modified=bool(found))


@dataclass(frozen=True)
class _Part:
    product: ir.Node
    scaled: ir.Node
    scales: ir.Value

    def input(self, index: int) -> ir.Value | None:
        """Of the product: rows, weight, one, the weight's scale, zero point."""
        return self.product.inputs[index]


_WEIGHT, _SCALE = 1, 3


def _parts(node: ir.Node) -> list[_Part] | None:
    """What ``node`` attends with, where the rule covers it."""
    if (node.domain, node.op_type) != (_DOMAIN, "GroupQueryAttention"):
        return None
    parts = [part for value in node.inputs[:_PARTS] if (part := _part(value)) is not None]
    if len(parts) != _PARTS:
        return None
    alike = {(part.scales, *(part.input(index) for index in (0, 2, 4))) for part in parts}
    return parts if len(alike) == 1 else None


def _part(value: ir.Value | None) -> _Part | None:
    scaled = None if value is None else value.producer()
    if value is None or scaled is None or (scaled.domain, scaled.op_type) != ("", "Mul") or not _is_private(value):
        return None
    result, scales = scaled.inputs
    product = None if result is None else result.producer()
    if result is None or scales is None or product is None or not _is_private(result):
        return None
    if (product.domain, product.op_type, len(product.inputs)) != (_DOMAIN, "MatMulIntegerToFloat", 5):
        return None
    constants = [product.inputs[index] for index in (_WEIGHT, _SCALE)]
    private = all(value is not None and constant_shape(value) is not None and _is_private(value) for value in constants)
    return _Part(product, scaled, scales) if private else None


def _is_private(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _pack(graph: ir.Graph, attention: ir.Node, parts: Sequence[_Part]) -> None:
    op = NodeList(graph, f"{attention.name}.int8")
    weight, scale = (_side_by_side(op, name, parts, at) for name, at in (("weight", _WEIGHT), ("scale", _SCALE)))
    inputs = list(parts[0].product.inputs)
    inputs[_WEIGHT], inputs[_SCALE] = weight, scale
    product = op.add_of(_DOMAIN, "MatMulIntegerToFloat", *(value for value in inputs if value is not None))
    packed = op.add("Mul", product, parts[0].scales)
    op.insert_before(attention)
    for index, value in enumerate((packed, None, None)):
        attention.replace_input_with(index, value)
    constants = [part.input(index) for part in parts for index in (_WEIGHT, _SCALE)]
    graph.remove([node for part in parts for node in (part.scaled, part.product)], safe=True)
    for value in constants:
        if value is not None:
            graph.initializers.pop(str(value.name), None)


def _side_by_side(op: NodeList, name: str, parts: Sequence[_Part], index: int) -> ir.Value:
    """The parts' constants, their columns one after another."""
    values = [value for part in parts if (value := part.input(index)) is not None]
    tensors = [value.const_value for value in values if value.const_value is not None]
    *leading, _ = constant_shape(values[0]) or ()
    columns = sum((constant_shape(value) or (0,))[-1] for value in values)

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([np.asarray(tensor.numpy()) for tensor in tensors], axis=-1))

    return op.initializer(name, ir.LazyTensor(compute, tensors[0].dtype, ir.Shape([*leading, columns])))

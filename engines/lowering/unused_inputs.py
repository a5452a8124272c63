"""Inputs that no node reads any more go: whoever runs the graph need not make them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


class DropUnusedInputs(ir.passes.InPlacePass):
    """An input that no result follows from is none of the graph's any more; nor are nodes of which the same is true.

    Requires, of whoever runs it: to give a session the inputs that it asks for. Where attention is told of lengths, a
    decoder's are without ``attention_mask`` and ``position_ids``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        nodes = RemoveUnusedNodesPass()(model)
        graph = model.graph
        unused = [value for value in graph.inputs if not value.uses() and not value.is_graph_output()]
        for value in unused:
            graph.inputs.remove(value)
        return ir.passes.PassResult(model, modified=nodes.modified or bool(unused))

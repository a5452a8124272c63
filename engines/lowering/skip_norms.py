"""A residual sum and the norm that reads it become one operator of ONNX Runtime's.

``com.microsoft::SkipSimplifiedLayerNormalization(x, y, weight)`` gives the norm of ``x + y``, and the sum as its fourth
result: one pass over the hidden state instead of two, and one operator less to start, twice a decoder layer.
"""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import constant_shape

_DOMAIN = "com.microsoft"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_RANK = 3  # [batch, seq, hidden]: what the operator takes


class FuseSkipNorms(ir.passes.InPlacePass):
    """``RMSNormalization(Add(x, y), weight)`` becomes ``SkipSimplifiedLayerNormalization(x, y, weight)``.

    Covers norms over the last of three axes, with a constant weight and statistics in float32, of a sum of two values
    of one known shape. The sum may have other users, but is no result of the graph, and one norm reads it. Anything
    else is left as it is.

    Ensures: the sum and the norm under their names, equal but for the order in which squares are added.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        pairs = [(norm, add) for norm in graph if (add := _covered_sum(norm)) is not None]
        for norm, add in pairs:
            _fuse(graph, norm, add)
        if pairs:
            graph.opset_imports.setdefault(_DOMAIN, 1)
        return ir.passes.PassResult(model, modified=bool(pairs))


def _covered_sum(norm: ir.Node) -> ir.Node | None:
    """The sum that a norm reads, where the rule covers both."""
    if (norm.domain, norm.op_type) != ("", "RMSNormalization") or None in norm.inputs:
        return None
    total, weight = norm.inputs
    add = None if total is None else total.producer()
    if total is None or weight is None or add is None or (add.domain, add.op_type) != ("", "Add"):
        return None
    sizes = [_sizes(value) for value in add.inputs]
    covered = (
        sizes[0] is not None
        and sizes[0] == sizes[1]
        and constant_shape(weight) == (sizes[0][-1],)
        and weight.dtype in _FLOATS
        and norm.attributes.get_int("axis", -1) in (-1, _RANK - 1)
        and norm.attributes.get_int("stash_type", 1) == 1
        and not total.is_graph_output()
        and not norm.outputs[0].is_graph_output()
        and sum(use.node.op_type == "RMSNormalization" for use in total.uses()) == 1
    )
    return add if covered else None


def _sizes(value: ir.Value | None) -> list[int | str] | None:
    """Sizes and names of three known axes."""
    if value is None or value.shape is None or len(value.shape) != _RANK:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in sizes else [size for size in sizes if size is not None]


def _fuse(graph: ir.Graph, norm: ir.Node, add: ir.Node) -> None:
    pairs = [(old, ir.Value(type=old.type, shape=old.shape)) for old in (norm.outputs[0], add.outputs[0])]
    (_, normed), (_, total) = pairs
    node = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        outputs=[normed, ir.Value(name=""), ir.Value(name=""), total],
        domain=_DOMAIN,
        name=f"{norm.name}.skip",
    )
    graph.insert_after(add, node)
    for old, new in pairs:
        for user, index in [(use.node, use.idx) for use in old.uses() if use.node is not norm]:
            user.replace_input_with(index, new)
    graph.remove([norm, add], safe=True)
    for old, new in pairs:
        old.name, new.name = None, old.name

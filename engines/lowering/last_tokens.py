"""The last layer works on the tokens whose logits are wanted, not on all: rows are picked before it, not behind it.

Of a prompt, only the last token's logits are asked for. The canonical graph picks its hidden state behind the last
layer. Behind that layer's attention no token looks at another, so that the state can be picked there as well: of 233
tokens, 232 go through one output projection and one feed-forward layer less. That is 2.5 % of the products of a prompt
in a decoder of 30 layers, 4 % in one of 22.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import NodeList, constant_integers, constant_shape

_RANK = 3  # [batch, seq, columns]
_ELEMENTWISE = frozenset({"Add", "Cast", "Div", "Gelu", "Mul", "Sigmoid", "Sub", "Tanh"})
_LAST_AXIS = (-1, _RANK - 1)


class PickLastTokensEarly(ir.passes.InPlacePass):
    """``GatherND(f(x, y), last)`` becomes ``f(GatherND(x, last), GatherND(y, last))``, ``f`` working row by row.

    Covers one token a row, picked with ``batch_dims`` 1 from ``[batch, seq, columns]`` by an input of the graph. Row by
    row work products with constant weights, sums and products of values of that form or with constants of one axis,
    element-wise functions, RMSNormalization over the columns, and a choice of columns. What else uses a value stays
    behind all of its rows.

    Ensures: the picked rows under their name, equal but for how a backend multiplies one row and how many. Nothing
    changes where the rows are picked from a graph's input, or from what is not computed row by row.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        picks = [pick for node in graph if (pick := _pick(node)) is not None]
        later = [(pick, cone) for pick in picks if (cone := _cone(graph, pick.node))]
        for pick, cone in later:
            _pick_before(graph, pick, cone)
        return ir.passes.PassResult(model, modified=bool(later))


@dataclass(frozen=True)
class _Pick:
    node: ir.Node
    data: ir.Value
    index: ir.Value
    """int64 ``[batch]``, an input of the graph."""


def _pick(node: ir.Node) -> _Pick | None:
    if (node.domain, node.op_type) != ("", "GatherND") or node.attributes.get_int("batch_dims", 0) != 1:
        return None
    data, indices = node.inputs
    if data is None or indices is None or not _is_rows(data) or node.outputs[0].is_graph_output():
        return None
    maker = indices.producer()
    if maker is None or maker.op_type != "Unsqueeze" or constant_integers(maker.inputs[1]) not in ([1], [-1]):
        return None
    index = maker.inputs[0]
    return _Pick(node, data, index) if index is not None and index.is_graph_input() else None


def _is_rows(value: ir.Value) -> bool:
    """Whether it is of three axes, the second as long as there are tokens."""
    return value.shape is not None and len(value.shape) == _RANK and not isinstance(value.shape[1], int)


def _cone(graph: ir.Graph, pick: ir.Node) -> set[ir.Node]:
    """What works row by row and for ``pick`` alone."""
    cone = {pick}
    for node in reversed(graph):
        if len(node.outputs) == 1 and _is_row_by_row(node) and _is_private(node.outputs[0], cone):
            cone.add(node)
    return cone - {pick}


def _is_private(value: ir.Value, users: set[ir.Node]) -> bool:
    nodes = {use.node for use in value.uses()}
    return bool(nodes) and nodes <= users and not value.is_graph_output()


def _is_row_by_row(node: ir.Node) -> bool:
    if node.domain != "" or not _is_rows(node.outputs[0]) or None in node.inputs:
        return False
    rows = [value for value in node.inputs if value is not None and constant_shape(value) is None]
    others = [value for value in node.inputs if value is not None and constant_shape(value) is not None]
    if node.op_type == "MatMul":
        x, weight = node.inputs
        return x is not None and _is_rows(x) and weight is not None and _is_constant(weight)
    if not all(_is_rows(value) for value in rows):
        return False
    if node.op_type in _ELEMENTWISE:
        alike = {_tokens(value) for value in rows} == {_tokens(node.outputs[0])}  # no row is broadcast
        return alike and all(len(constant_shape(value) or ()) <= 1 for value in others)
    if node.op_type == "RMSNormalization":
        return len(rows) == 1 and node.attributes.get_int("axis", -1) in _LAST_AXIS
    return node.op_type == "Gather" and rows == [node.inputs[0]] and node.attributes.get_int("axis", 0) in _LAST_AXIS


def _tokens(value: ir.Value) -> tuple[object, ...]:
    """Batch and number of tokens, by name where they have one."""
    sizes = () if value.shape is None else tuple(s if isinstance(s, int) else s.value for s in value.shape)
    return sizes[:2]


def _is_constant(weight: ir.Value) -> bool:
    """Whether it is a matrix that is a constant, or made of constants."""
    if weight.shape is None or len(weight.shape) != _RANK - 1:
        return False
    maker = weight.producer()
    if maker is None:
        return constant_shape(weight) is not None
    return all(value is None or constant_shape(value) is not None for value in maker.inputs)


def _pick_before(graph: ir.Graph, pick: _Pick, cone: set[ir.Node]) -> None:
    """Rows stay of three axes, ``[batch, 1, columns]``, until the place where they were picked: passes want three."""
    op = NodeList(graph, f"{pick.node.outputs[0].name}.early")
    index = op.add("Unsqueeze", pick.index, op.integers([1, 2]))  # [batch, 1, 1]
    picked: dict[ir.Value, ir.Value] = {}
    for node in (node for node in graph if node in cone):
        for at, value in enumerate(node.inputs):
            if value is None or constant_shape(value) is not None or not _is_rows(value) or value.producer() in cone:
                continue
            if value not in picked:
                picked[value] = op.add("GatherND", value, index, batch_dims=1)
                picked[value].type, picked[value].shape = value.type, _one_token(value)
                op.insert_before(node)
            node.replace_input_with(at, picked[value])
    for node in cone:
        node.outputs[0].shape = _one_token(node.outputs[0])
    op.take_place_of(pick.node, op.add("Squeeze", pick.data, op.integers([1])))


def _one_token(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape([value.shape[0], 1, value.shape[2]])

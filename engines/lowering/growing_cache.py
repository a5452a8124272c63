"""A cache that grows by concatenation, for releases of TensorRT that cannot write into a buffer."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import NodeList, cache_values, constant_integers, require_gone, static_size

_WRITE, _MASK, _POSITIONS = "write_indices", "attention_mask", "position_ids"
_PAST, _BEFORE, _AFTER = "past.", "past_len", "total"
_AXIS = 2  # of [batch, kv_heads, slots, head_dim]


class GrowCache(ir.passes.InPlacePass):
    """``Slice(TensorScatter(past, new, write_indices), total)`` becomes ``Concat(past, new)``, and that is ``present``.

    Requires: a decoder's graph as :meth:`~llava_deploy.engines.contract.DecoderShape.spec` describes it; every
    ``TensorScatter`` takes an input ``past.*`` whole and gives an output ``present.*``, linear on axis -2, at
    ``write_indices``; each result is looked at only through slices of its first slots, as many as the mask covers.

    Ensures: inputs and outputs are those of :meth:`~llava_deploy.engines.contract.DecoderShape.growing_spec`: the input
    ``write_indices`` is gone, ``past.*`` have ``past_len`` slots and ``present.*`` ``total``, which is ``past_len +
    seq``. Where a row writes at ``past_len``, its numbers are those of the graph before; a row that has fewer slots
    than others has some that its mask hides, and the same numbers.
    """

    def requires(self, model: ir.Model) -> None:
        """Every cache is of the form that the rule covers."""
        names = {str(value.name) for value in model.graph.inputs}
        if not {_WRITE, _MASK, _POSITIONS} <= names:
            raise ir.passes.PreconditionError(f"want a decoder with inputs {_WRITE} and {_MASK}, found {sorted(names)}")
        for node in model.graph:
            if node.op_type == "TensorScatter" and (problem := _problem(node)) is not None:
                raise ir.passes.PreconditionError(f"{node.name!r}: a cache that cannot be made to grow: {problem}")
        for value in model.graph.outputs:
            maker = value.producer()
            if str(value.name).startswith("present.") and (maker is None or maker.op_type != "TensorScatter"):
                raise ir.passes.PreconditionError(f"output {value.name!r}: want it made by TensorScatter")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        scatters = [node for node in graph if node.op_type == "TensorScatter"]
        ends: set[ir.Value] = set()
        for node in scatters:
            past, new, _ = (value for value in node.inputs if value is not None)
            slices = [use.node for use in node.outputs[0].uses()]
            ends.update(value for each in slices if (value := each.inputs[2]) is not None)
            op = NodeList(graph, str(node.name))
            present = op.add("Concat", past, new, axis=_AXIS)
            op.take_place_of(node, present)
            _give_length(past, _BEFORE)
            _give_length(present, _AFTER)
            for each in slices:
                each.outputs[0].replace_all_uses_with(present)
                graph.remove(each, safe=True)
        for value in ends:
            maker = value.producer()
            if maker is not None and not value.uses():
                graph.remove(maker, safe=True)
        for value in [value for value in graph.inputs if value.name == _WRITE and not value.uses()]:
            graph.inputs.remove(value)
        return ir.passes.PassResult(model, modified=bool(scatters))

    def ensures(self, model: ir.Model) -> None:
        """Nothing is scattered, and nobody says where to."""
        require_gone(model, "TensorScatter")
        if any(value.name == _WRITE for value in model.graph.inputs):
            raise ir.passes.PostconditionError(f"input {_WRITE!r}: is used still")
        for value in cache_values(model.graph):
            want = _BEFORE if str(value.name).startswith(_PAST) else _AFTER
            if value.shape is None or value.shape[_AXIS] != want:
                raise ir.passes.PostconditionError(f"cache {value.name!r}: want length {want}, has shape {value.shape}")


def _problem(node: ir.Node) -> str | None:
    """Why the rule does not cover a ``TensorScatter``."""
    if len(node.inputs) != 3 or any(value is None for value in node.inputs):
        return "want a cache, what is written, and where"
    past, _, write = (value for value in node.inputs if value is not None)
    present = node.outputs[0]
    if not past.is_graph_input() or not str(past.name).startswith(_PAST) or len(past.uses()) != 1:
        return f"want an input past.* that nothing else uses, got {past.name!r}"
    if write.name != _WRITE or not write.is_graph_input() or not present.is_graph_output():
        return f"want {_WRITE} to say where, and an output of the graph, got {write.name!r} and {present.name!r}"
    if (
        node.attributes.get_int("axis", -2) not in (-2, _AXIS)
        or node.attributes.get_string("mode", "linear") != "linear"
    ):
        return "want axis -2, linear"
    if past.shape is None or len(past.shape) != 4:
        return f"want four axes, got {past.shape}"
    static_size(past, 1)
    for use in present.uses():
        if not _is_visible_part(use.node) or use.idx != 0:
            return f"want it used by slices of as many slots as {_MASK} covers, got {use.node.op_type}"
    return None


def _is_visible_part(node: ir.Node) -> bool:
    """Whether it is ``Slice(…, [0], total, [2])``, ``total`` being the mask's last size."""
    if node.op_type != "Slice" or len(node.inputs) != 4 or node.inputs[2] is None:
        return False
    shape = node.inputs[2].producer()
    if shape is None or shape.op_type != "Shape" or shape.inputs[0] is None or shape.inputs[0].name != _MASK:
        return False
    last = (shape.attributes.get_int("start", 0), shape.attributes.get_int("end", 4)) == (3, 4)
    return last and (constant_integers(node.inputs[1]), constant_integers(node.inputs[3])) == ([0], [_AXIS])


def _give_length(value: ir.Value, length: str) -> None:
    if value.shape is not None:
        value.shape = ir.Shape([length if axis == _AXIS else dim for axis, dim in enumerate(value.shape)])

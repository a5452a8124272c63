"""Attention over the cache where it lies: ONNX Runtime's GroupQueryAttention in place of Slice and Attention.

The canonical graph says "write the new keys, look at the first ``total`` slots": TensorScatter into the cache, then
Slice, which ONNX Runtime carries out as a copy of all that is visible, every token and layer. Its own operator
``com.microsoft::GroupQueryAttention`` rotates, writes into the buffer that is bound as past and present, and attends
to it in place. What it sees follows from lengths and not from a mask: with ``total = write_indices + seq``, row ``b``'s
token ``j`` has position ``write_indices[b] + j`` and sees the slots up to it.

Where q, k and v are the parts of one product, the operator takes that product as it is, and nothing is split.

Several rows with several tokens each behind a past (a long batch's prompts, in pieces) it takes on the CPU where it is
told how many of each row's tokens are new, ``query_seqlens``: an input that ONNX Runtime 1.32 has. Older ones refuse
such a step. For them each layer becomes an ``If``: such a step takes the canonical operators, which are moved into its
one branch as they are, and every other step takes GroupQueryAttention in the other. Both branches write into the bound
buffers. The branch costs some 10 µs a layer and token.

On a GPU the operator wants one of the lengths on the host. Were it computed in the graph, every step would wait for a
copy of it; so there the caller states the lengths, as inputs of the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import NodeList
from llava_deploy.engines.onnxruntime_cuda import HEAD_DIM, LAST_SLOTS, TOTAL_SLOTS

_DOMAIN = "com.microsoft"
_BEFORE_NEW = 7  # inputs of the operator that stand between the tables and the numbers of new tokens
_HEADS_FIRST = (0, 2, 1, 3)  # [batch, seq, heads, head_dim] to [batch, heads, seq, head_dim], and back


class Form(Enum):
    """Of what takes attention's place."""

    ALONE = auto()
    """GroupQueryAttention, which is told of new tokens."""

    BRANCH = auto()
    """GroupQueryAttention in a branch, the canonical operators in the other."""

    STATED = auto()
    """GroupQueryAttention whose lengths are inputs of the graph, as ``engines/onnxruntime_cuda.py`` names them.

    Several rows with several tokens each behind a past it refuses.
    """


class LowerGroupQueryAttention(ir.passes.InPlacePass):
    """``Attention`` over a sliced cache becomes ``GroupQueryAttention``, or an ``If`` with it in one branch.

    Requires, of the graph: inputs named as :class:`~llava_deploy.engines.contract.DecoderShape` has them. Of whoever
    runs it, which no graph can show: ``position_ids`` are ``write_indices + j``, the mask is causal up to them, and
    past and present are bound to the same memory. ``runtime/onnxruntime_feed.py`` and
    ``runtime/onnxruntime_backend.py`` see to it; the canonical graph would take any positions
    and mask. Between separate buffers, which are copied at every step, a row's slots behind its new keys are not
    carried over.

    Ensures: results as the canonical graph's but for rounding, under their names; the graph's inputs and outputs, and
    all other values, are as they were, but for two inputs more of :attr:`Form.STATED`; every layer of the form below is
    lowered.

    Does not cover, and leaves as it is: another form than reshaped and transposed projections, RotaryEmbedding of all
    of q and k by tables ``[positions, head_dim / 2]``, TensorScatter, Slice, Attention by mask without attributes; a
    ``head_dim`` that is no multiple of 16; any of the values in between used by others.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self._form = form

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        layers = [layer for node in graph if node.op_type == "Attention" and (layer := _layer(node)) is not None]
        if layers:
            graph.opset_imports.setdefault(_DOMAIN, 1)
            lengths = _lengths(graph, self._form)
            for index, layer in enumerate(layers):
                _lower(graph, layer, lengths, f"attention.{index}")
        return ir.passes.PassResult(model, modified=bool(layers))


@dataclass(frozen=True)
class _Layer:
    """One layer's attention: the nodes from projections to the output layer's input, in order, and their ends."""

    nodes: tuple[ir.Node, ...]
    projections: tuple[ir.Value | None, ...]
    """q, k, v ``[batch, seq, heads * head_dim]``; or the value that they are parts of, in this order, and no others."""
    past: tuple[ir.Value, ir.Value]
    """Key and value."""
    tables: tuple[ir.Value, ...]
    """Cosine and sine ``[positions, head_dim / 2]``."""
    heads: int
    kv_heads: int
    results: tuple[ir.Value, ...]
    """Attended values ``[batch, seq, heads * head_dim]``; present key and value."""


@dataclass(frozen=True)
class _Lengths:
    """What every layer of one step shares."""

    last: ir.Value  # int32 [batch]: each row's last slot that is visible
    total: ir.Value  # int32 scalar: slots of the longest row
    new: ir.Value | None  # int32 [batch]: each row's new tokens, for the operator that is told of them
    refused: ir.Value | None  # bool scalar: a step that the operator refuses; for the other form


class _OtherFormError(Exception):
    """The nodes are not of the form that the rule covers."""


class _Trail:
    """Follows values to the nodes that make them, and keeps these."""

    def __init__(self) -> None:
        self.nodes: set[ir.Node] = set()

    def maker(self, value: ir.Value | None, op_type: str, inputs: int, **attributes: object) -> list[ir.Value]:
        """Inputs of the node that makes ``value``, which must be of this type, with these attributes and no others."""
        node = None if value is None else value.producer()
        if node is None or (node.domain, node.op_type) != ("", op_type) or len(node.inputs) != inputs:
            raise _OtherFormError
        found = {name: attribute.value for name, attribute in node.attributes.items()}
        if found != attributes:
            raise _OtherFormError
        self.nodes.add(node)
        values = [each for each in node.inputs if each is not None]
        if len(values) != inputs:
            raise _OtherFormError
        return values

    def user(self, value: ir.Value, op_type: str) -> ir.Value:
        """Result of the one node that takes ``value``; its inputs and attributes are held against by :meth:`maker`."""
        uses = [*value.uses()]
        if len(uses) != 1 or uses[0].node.op_type != op_type:
            raise _OtherFormError
        return uses[0].node.outputs[0]

    def heads(self, value: ir.Value) -> tuple[ir.Value, int, int]:
        """The projection that ``value`` is the heads of, their number and their size."""
        (split,) = self.maker(value, "Transpose", 1, perm=_HEADS_FIRST)
        projection, shape = self.maker(split, "Reshape", 2)
        sizes = _constant(shape)
        if len(sizes) != len(_HEADS_FIRST) or sizes[:2] != [0, 0]:
            raise _OtherFormError
        return projection, sizes[2], sizes[3]

    def cache(self, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Cache before and after the write, and what is written."""
        present, starts, _, axes = self.maker(value, "Slice", 4)
        past, new, write = self.maker(present, "TensorScatter", 3, axis=-2, mode="linear")
        if _constant(starts) != [0] or _constant(axes) != [2] or write.name != "write_indices":
            raise _OtherFormError
        return past, present, new


def _layer(attention: ir.Node) -> _Layer | None:
    """The layer around an ``Attention``, or ``None`` where the rule does not cover it."""
    trail = _Trail()
    try:
        turned = trail.user(attention.outputs[0], "Transpose")
        merged = trail.user(turned, "Reshape")
        trail.maker(merged, "Reshape", 2)
        trail.maker(turned, "Transpose", 1, perm=_HEADS_FIRST)
        q, keys, values, mask = trail.maker(attention.outputs[0], "Attention", 4)
        past_key, present_key, k = trail.cache(keys)
        past_value, present_value, v = trail.cache(values)
        q, *q_tables, q_positions = trail.maker(q, "RotaryEmbedding", 4)
        k, *k_tables, k_positions = trail.maker(k, "RotaryEmbedding", 4)
        (q, heads, head_dim), (k, kv_heads, _), (v, _, _) = (trail.heads(value) for value in (q, k, v))
    except _OtherFormError:
        return None
    results = (merged, present_key, present_value)
    if (
        q_tables != k_tables
        or (mask.name, q_positions.name, k_positions.name) != ("attention_mask", "position_ids", "position_ids")
        or head_dim % HEAD_DIM
        or not all(table.shape is not None and table.shape[-1] == head_dim // 2 for table in q_tables)
        or _leaks(trail.nodes, results)
    ):
        return None
    projections: tuple[ir.Value | None, ...] = (q, k, v)
    nodes = trail.nodes
    split = _split_into(projections)
    if split is not None and not _leaks({*nodes, split}, results):
        projections, nodes = (split.inputs[0], None, None), {*nodes, split}
    order = tuple(node for node in attention.graph or () if node in nodes)
    return _Layer(order, projections, (past_key, past_value), tuple(q_tables), heads, kv_heads, results)


def _split_into(parts: tuple[ir.Value | None, ...]) -> ir.Node | None:
    """The node that splits a value along its last axis into ``parts``, in this order, as ``FuseLinears`` has it."""
    node = None if parts[0] is None else parts[0].producer()
    if node is None or (node.domain, node.op_type) != ("", "Split") or tuple(node.outputs) != parts:
        return None
    return node if node.attributes.get_int("axis", 0) == -1 else None


def _constant(value: ir.Value) -> list[int]:
    tensor = value.const_value
    if tensor is None or value.is_graph_input():
        raise _OtherFormError
    return [int(size) for size in tensor.numpy().reshape(-1)]


def _leaks(nodes: set[ir.Node], results: tuple[ir.Value, ...]) -> bool:
    """Whether a value made by ``nodes``, no result of theirs, is used by others."""
    inner = (value for node in nodes for value in node.outputs if value not in results)
    return any(value.is_graph_output() or any(use.node not in nodes for use in value.uses()) for value in inner)


def _lengths(graph: ir.Graph, form: Form) -> _Lengths:
    if form is Form.STATED:
        int32 = ir.TensorType(ir.DataType.INT32)
        last = ir.Value(name=LAST_SLOTS, type=int32, shape=ir.Shape(["batch"]))
        stated = ir.Value(name=TOTAL_SLOTS, type=int32, shape=ir.Shape([]))
        graph.inputs.extend([last, stated])
        return _Lengths(last=last, total=stated, new=None, refused=None)
    return _computed_lengths(graph, form)


def _computed_lengths(graph: ir.Graph, form: Form) -> _Lengths:
    inputs = {value.name: value for value in graph.inputs}
    embeds, write = inputs["inputs_embeds"], inputs["write_indices"]
    op = NodeList(graph, "attention.lengths")
    int32 = int(ir.DataType.INT32)
    one = op.scalar(1, ir.DataType.INT32)
    batch = op.add("Shape", embeds, start=0, end=1)
    seq = op.add("Cast", op.add("Shape", embeds, start=1, end=2), to=int32)  # [1]
    ends = op.add("Add", op.add("Cast", write, to=int32), seq)  # [batch]
    total = op.add("ReduceMax", ends, keepdims=1)  # [1]
    lengths = _Lengths(last=op.add("Sub", ends, one), total=op.add("Squeeze", total), new=None, refused=None)
    if form is Form.ALONE:
        lengths = replace(lengths, new=op.add("Expand", seq, batch))
    else:
        rows = op.add("Cast", batch, to=int32)
        several = op.add("And", op.add("Greater", rows, one), op.add("Greater", seq, one))
        lengths = replace(lengths, refused=op.add("Squeeze", op.add("And", several, op.add("Greater", total, seq))))
    op.insert_before(graph[0])
    return lengths


def _lower(graph: ir.Graph, layer: _Layer, lengths: _Lengths, name: str) -> None:
    """The canonical nodes move into one branch, or go; what they gave is the result of what takes their place."""
    results = tuple(_like(value, str(value.name)) for value in layer.results)
    for old, new in zip(layer.results, results, strict=True):
        for node, index in [(use.node, use.idx) for use in old.uses() if use.node not in layer.nodes]:
            node.replace_input_with(index, new)
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
        old.name = f"{new.name}.canonical"
    alone = lengths.refused is None
    told = [] if lengths.new is None else [*[None] * _BEFORE_NEW, lengths.new]
    lowered = ir.node(
        "GroupQueryAttention",
        inputs=[*layer.projections, *layer.past, lengths.last, lengths.total, *layer.tables, *told],
        attributes={"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "do_rotary": 1},
        domain=_DOMAIN,
        outputs=results if alone else [_like(value, f"{value.name}.lowered") for value in results],
        name=f"{name}.GroupQueryAttention",
    )
    place = layer.nodes[-1]
    if alone:
        graph.insert_after(place, lowered)
        graph.remove(layer.nodes, safe=True)
        return
    choice = ir.node("If", inputs=[lengths.refused], outputs=results, name=name)
    graph.insert_after(place, choice)
    graph.remove(layer.nodes)
    branches = {
        "then_branch": ir.Graph([], layer.results, nodes=layer.nodes, name=f"{name}.canonical"),
        "else_branch": ir.Graph([], lowered.outputs, nodes=[lowered], name=f"{name}.lowered"),
    }
    for key, branch in branches.items():
        choice.attributes[key] = ir.AttrGraph(key, branch)


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)

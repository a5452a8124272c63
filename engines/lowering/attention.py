"""Attention in elementary operators, for releases of TensorRT without it (opset 23's)."""

from __future__ import annotations

import math

import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import (
    NodeList,
    attribute_problem,
    constant_integers,
    lowered,
    require_gone,
    require_lowerable,
    static_size,
)

_OPERATOR = "Attention"
_RANK = 4
_HEADS = 1  # the axis, of [batch, heads, seq, head_dim]
_HIDDEN = -1e30
"""Added to scores that the mask hides: their exponential is zero beside any other. Not an infinity, so that a row that
sees nothing gives a mean of all values and no NaN."""


class LowerAttention(ir.passes.InPlacePass):
    """``Attention(q, k, v, mask)`` becomes two products around a softmax in float32.

        ``softmax(cast(q · scale @ kᵀ) + bias) @ v``, with ``scale = 1 / sqrt(head_dim)``

    Where several heads of ``q`` share one of ``k`` and ``v``, they are rows of one product, ``[batch, kv_heads,
    group · seq, head_dim]``, so that keys and values are never repeated. The mask becomes a bias of 0 and -1e30, its
    rows as often as a group has heads, once for all layers that share it. So nothing is between the products but what
    TensorRT's guide names as the form that it fuses, the queries scaled before the first.

    Requires: ``q`` of four axes with known heads and head size, ``k`` and ``v`` with known heads (where their shapes
    are not known: as those that they are sliced or scattered from), the former's a multiple of the latter's; a mask of
    bools, or none; attributes: ``scale`` or none; one output.

    Ensures: no such operator is left. Scores are rounded to the dtype of ``q`` before the softmax, and probabilities
    after it, as transformers' own attention does: in float16 an error of ``2^-11 · max|score|`` relative to each
    probability. A row that sees nothing is outside of the canonical graph's contract.
    """

    def requires(self, model: ir.Model) -> None:
        """Every one is of the form that the rule covers."""
        require_lowerable(model, _OPERATOR, _problem)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        biases: dict[tuple[ir.Value, int], ir.Value] = {}

        def lower(graph: ir.Graph, node: ir.Node) -> None:
            mask, group = node.inputs[3] if len(node.inputs) == _RANK else None, _group(node)
            if mask is not None and (mask, group) not in biases:
                biases[mask, group] = _bias(graph, node, mask, group)
            _lower(graph, node, group, None if mask is None else biases[mask, group])

        return lowered(model, _OPERATOR, lower)

    def ensures(self, model: ir.Model) -> None:
        """None is left, in subgraphs neither."""
        require_gone(model, _OPERATOR)


def _problem(node: ir.Node) -> str | None:
    inputs = [*node.inputs]
    if len(inputs) not in (3, 4) or any(value is None for value in inputs) or len(node.outputs) != 1:
        return "want q, k, v and perhaps a mask, and one output"
    q, k, v, *masks = (value for value in inputs if value is not None)
    if q.shape is None or len(q.shape) != _RANK or not all(isinstance(q.shape[axis], int) for axis in (_HEADS, -1)):
        return f"want q of four axes, heads and head size known, got {q.shape}"
    heads, groups = static_size(q, _HEADS), {_heads(k), _heads(v)}
    if len(groups) != 1 or None in groups or heads % (groups.pop() or 1):
        return f"want keys and values of as many heads, which divide {heads}, got {_heads(k)} and {_heads(v)}"
    if any(mask.dtype != ir.DataType.BOOL or mask.shape is None or len(mask.shape) != _RANK for mask in masks):
        return "want a mask of bools with four axes"
    return attribute_problem(node, scale=None)


def _heads(value: ir.Value) -> int | None:
    """Heads of keys or values: an axis that neither slices of other axes nor scatters change."""
    if value.shape is not None and len(value.shape) == _RANK and isinstance(value.shape[_HEADS], int):
        return static_size(value, _HEADS)
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return None
    sliced = constant_integers(node.inputs[3]) if node.op_type == "Slice" and len(node.inputs) > 3 else None
    if node.op_type == "TensorScatter" or (sliced is not None and not {_HEADS, _HEADS - _RANK} & {*sliced}):
        return _heads(node.inputs[0])
    return None


def _group(node: ir.Node) -> int:
    """Heads of queries to a head of keys."""
    q, k, *_ = (value for value in node.inputs if value is not None)
    return static_size(q, _HEADS) // (_heads(k) or 1)


def _bias(graph: ir.Graph, first: ir.Node, mask: ir.Value, group: int) -> ir.Value:
    """Float32 ``[batch, 1, group * seq, total]``, in front of the first node that wants it."""
    op = NodeList(graph, f"{mask.name}.bias_{group}")
    bias = op.add("Where", mask, op.float32(0.0), op.float32(_HIDDEN))
    if group > 1:
        bias = op.add("Concat", *[bias] * group, axis=2)
    op.insert_before(first)
    return bias


def _lower(graph: ir.Graph, node: ir.Node, group: int, bias: ir.Value | None) -> None:
    q, k, v, *_ = (value for value in node.inputs if value is not None)
    heads, dtype = static_size(q, _HEADS), q.dtype or ir.DataType.FLOAT
    scale = node.attributes.get_float("scale", 1 / math.sqrt(static_size(q, -1)))
    op = NodeList(graph, str(node.name))
    queries = op.add("Mul", q, op.scalar(scale, dtype))
    if group > 1:  # heads of a group as rows of one: the same memory, as rows follow each other within a head
        queries = op.add("Reshape", queries, op.integers([0, heads // group, -1, 0]))
    scores = op.add("MatMul", queries, op.add("Transpose", k, perm=[0, 1, 3, 2]))  # [batch, kv_heads, rows, total]
    scores = op.cast(scores, dtype, ir.DataType.FLOAT)
    if bias is not None:
        scores = op.add("Add", scores, bias)
    weights = op.cast(op.add("Softmax", scores, axis=-1), ir.DataType.FLOAT, dtype)
    result = op.add("MatMul", weights, v)  # [batch, kv_heads, rows, head_dim]
    if group > 1:
        result = op.add("Reshape", result, op.integers([0, heads, -1, 0]))
    op.take_place_of(node, result)

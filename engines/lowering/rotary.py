"""RotaryEmbedding in elementary operators, for releases of TensorRT without it (opset 23's)."""

from __future__ import annotations

from typing import TypeAlias

import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import (
    NodeList,
    attribute_problem,
    lowered,
    require_gone,
    require_lowerable,
    static_size,
)

_OPERATOR = "RotaryEmbedding"
_RANK = 4  # [batch, heads, seq, head_dim]

_Angles: TypeAlias = "tuple[ir.Value, ir.Value]"
"""Cosine ``[c, c]`` and signed sine ``[-s, s]`` of a step's positions, each ``[batch, 1, seq, head_dim]``."""


class LowerRotaryEmbedding(ir.passes.InPlacePass):
    """``RotaryEmbedding(x, cos, sin, positions)`` becomes ``x · [c, c] + swapped(x) · [-s, s]``.

    ``swapped`` exchanges the halves of the last axis. The rows ``c`` and ``s`` of the tables are looked up once for all
    that share them, which is every layer's queries and keys.

    Requires: no attributes but with their defaults; ``x`` of four axes and a known, even, last one; tables
    ``[positions, head_dim / 2]``, so that all of it is turned.

    Ensures: no such operator is left. Numbers are the same operations in the dtype of ``x``: each of two products and
    their sum is rounded to it, which is what transformers does and an error of at most ``2 u (|x1| + |x2|)`` for the
    unit roundoff ``u`` (2^-11 in float16) beside an operator that rounds once.
    """

    def requires(self, model: ir.Model) -> None:
        """Every one is of the form that the rule covers."""
        require_lowerable(model, _OPERATOR, _problem)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        shared: dict[tuple[ir.Value | None, ...], _Angles] = {}

        def lower(graph: ir.Graph, node: ir.Node) -> None:
            tables = tuple(node.inputs[1:])
            if tables not in shared:
                shared[tables] = _angles(graph, node, f"rotary.{len(shared)}")
            _lower(graph, node, shared[tables])

        return lowered(model, _OPERATOR, lower)

    def ensures(self, model: ir.Model) -> None:
        """None is left, in subgraphs neither."""
        require_gone(model, _OPERATOR)


def _problem(node: ir.Node) -> str | None:
    if len(node.inputs) != _RANK or any(value is None or value.shape is None for value in node.inputs):
        return "want x, cos, sin and position_ids of known shapes"
    x, cos, sin, _ = (value.shape for value in node.inputs if value is not None)
    head_dim = None if x is None else x[-1]
    if x is None or len(x) != _RANK or not isinstance(head_dim, int) or head_dim % 2:
        return f"want x of four axes, the last known and even, got {x}"
    for table in (cos, sin):
        if table is None or len(table) != 2 or table[-1] != head_dim // 2:
            return f"want tables [positions, {head_dim // 2}], got {table}"
    return attribute_problem(node, interleaved=0, num_heads=0, rotary_embedding_dim=0)


def _angles(graph: ir.Graph, first: ir.Node, prefix: str) -> _Angles:
    """Looked up in front of the first node that wants them."""
    _, cos, sin, positions = (value for value in first.inputs if value is not None)
    op = NodeList(graph, prefix)
    heads = op.integers([1])
    c, s = (op.add("Unsqueeze", op.add("Gather", table, positions, axis=0), heads) for table in (cos, sin))
    both = op.add("Concat", c, c, axis=-1), op.add("Concat", op.add("Neg", s), s, axis=-1)
    op.insert_before(first)
    return both


def _lower(graph: ir.Graph, node: ir.Node, angles: _Angles) -> None:
    (x, *_), (cos, sin) = (value for value in node.inputs if value is not None), angles
    head_dim = static_size(x, -1)
    op = NodeList(graph, str(node.name))
    ends = [op.integers([at]) for at in (0, head_dim // 2, head_dim)]
    axes = op.integers([_RANK - 1])
    low, high = op.add("Slice", x, ends[0], ends[1], axes), op.add("Slice", x, ends[1], ends[2], axes)
    swapped = op.add("Concat", high, low, axis=-1)
    op.take_place_of(node, op.add("Add", op.add("Mul", x, cos), op.add("Mul", swapped, sin)))

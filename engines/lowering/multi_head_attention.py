"""A tower's attention without its transposes: ONNX Runtime's MultiHeadAttention in place of Attention.

``com.microsoft::MultiHeadAttention`` takes queries, keys and values as the linear layers give them, ``[images, tokens,
heads * head_dim]``, adds their biases on the way, and never writes all of the scores down. Of a layer of 197 tokens and
12 heads of 64, on one thread, that takes 2.2 ms in place of 2.8 (1.32, a Zen 4 core, minima).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import constant_integers, constant_shape

_DOMAIN = "com.microsoft"
_HEADS_FIRST = (0, 2, 1, 3)  # [images, tokens, heads, head_dim] to [images, heads, tokens, head_dim], and back


class LowerMultiHeadAttention(ir.passes.InPlacePass):
    """``Attention`` over heads that were split and are merged again becomes ``MultiHeadAttention``.

    Covers float32 attention of every token to every token, without mask, cache or attributes, over reshaped and
    transposed queries, keys and values of one number of heads and one head size. Biases go along where all three are
    sums with a constant. Anything else is left as it is.

    Ensures: the merged heads under their name, equal but for rounding.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        layers = [layer for node in graph if (layer := _layer(node)) is not None]
        for layer in layers:
            _lower(graph, layer)
        if layers:
            graph.opset_imports.setdefault(_DOMAIN, 1)
        return ir.passes.PassResult(model, modified=bool(layers))


@dataclass(frozen=True)
class _Layer:
    nodes: tuple[ir.Node, ...]
    """From what splits the heads to what merges them; the last makes :attr:`merged`."""
    projections: tuple[ir.Value, ...]
    """Queries, keys and values ``[images, tokens, heads * head_dim]``."""
    heads: int
    merged: ir.Value


def _layer(attention: ir.Node) -> _Layer | None:
    if (attention.domain, attention.op_type) != ("", "Attention") or attention.attributes or len(attention.inputs) != 3:
        return None
    result = attention.outputs[0]
    turned = _only_user(result, "Transpose")
    merge = None if turned is None else _only_user(turned.outputs[0], "Reshape")
    if turned is None or merge is None or len(attention.outputs) != 1 or result.dtype != ir.DataType.FLOAT:
        return None
    splits = [_split_heads(value) for value in attention.inputs]
    sizes = {None if split is None else tuple(split.sizes) for split in splits}
    found = [split for split in splits if split is not None]
    if len(sizes) != 1 or len(found) != len(splits) or not _turns_heads(turned):
        return None
    heads, head_dim = found[0].sizes
    if constant_integers(merge.inputs[1]) != [0, 0, heads * head_dim]:
        return None
    nodes = (*(node for split in found for node in split.nodes), attention, turned, merge)
    return _Layer(nodes, tuple(split.projection for split in found), heads, merge.outputs[0])


@dataclass(frozen=True)
class _Split:
    nodes: tuple[ir.Node, ...]
    projection: ir.Value
    sizes: list[int]
    """Number of heads and size of each."""


def _split_heads(value: ir.Value | None) -> _Split | None:
    """How ``value`` came to be heads, where nothing else uses them."""
    turned = None if value is None else value.producer()
    reshape = None if turned is None or turned.inputs[0] is None else turned.inputs[0].producer()
    if value is None or turned is None or reshape is None or not _turns_heads(turned) or reshape.op_type != "Reshape":
        return None
    projection, sizes = reshape.inputs[0], constant_integers(reshape.inputs[1]) or []
    if projection is None or len(sizes) != len(_HEADS_FIRST) or sizes[:2] != [0, 0] or min(sizes[2:]) < 1:
        return None
    alone = all(len(each.uses()) == 1 and not each.is_graph_output() for each in (value, reshape.outputs[0]))
    return _Split((reshape, turned), projection, sizes[2:]) if alone else None


def _turns_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == _HEADS_FIRST


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type and not value.is_graph_output() else None


def _lower(graph: ir.Graph, layer: _Layer) -> None:
    sums = [_biased(value) for value in layer.projections]
    biased = [each for each in sums if each is not None]
    inputs = list(layer.projections)
    nodes = layer.nodes
    name = f"{layer.merged.name}.heads"
    if len(biased) == len(sums):
        inputs = [each.value for each in biased]
        inputs.append(_side_by_side(graph, f"{name}.bias", [each.bias for each in biased]))
        nodes = (*(each.node for each in biased), *nodes)
    result = ir.Value(type=layer.merged.type, shape=layer.merged.shape)
    node = ir.node(
        "MultiHeadAttention", inputs, {"num_heads": layer.heads}, domain=_DOMAIN, outputs=[result], name=name
    )
    graph.insert_before(nodes[-1], node)
    layer.merged.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name, layer.merged.name = layer.merged.name, None
    graph.remove(nodes, safe=True)
    for each in biased:
        if not each.bias.uses():
            graph.initializers.pop(str(each.bias.name), None)


@dataclass(frozen=True)
class _Sum:
    node: ir.Node
    value: ir.Value
    bias: ir.Value


def _biased(projection: ir.Value) -> _Sum | None:
    """What ``projection`` is the sum of, where one of it is a constant of a value a column and nobody else uses it."""
    node = projection.producer()
    if node is None or (node.domain, node.op_type) != ("", "Add") or len(projection.uses()) != 1:
        return None
    if projection.is_graph_output() or projection.shape is None:
        return None
    for value, bias in (node.inputs, node.inputs[::-1]):
        if value is not None and bias is not None and constant_shape(value) is None:
            sizes = constant_shape(bias)
            if sizes is not None and len(sizes) == 1 and sizes[0] == projection.shape[-1]:
                return _Sum(node, value, bias)
    return None


def _side_by_side(graph: ir.Graph, name: str, parts: Sequence[ir.Value]) -> ir.Value:
    """A constant of one axis, computed when it is read, as parts may be."""
    tensors = [part.const_value for part in parts if part.const_value is not None]
    shape = ir.Shape([sum(int(tensor.shape.numpy()[0]) for tensor in tensors)])

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([np.asarray(tensor.numpy()) for tensor in tensors]), name=name)

    tensor = ir.LazyTensor(compute, ir.DataType.FLOAT, shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    graph.register_initializer(value)
    return value

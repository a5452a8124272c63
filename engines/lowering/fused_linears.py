"""Quantised linear layers that read the same values become one: their weights beside each other, and a Split behind.

The projections of queries, keys and values read one normalised hidden state, and so do the gate and the up projection
of a feed-forward layer. One product instead of three, or of two, rounds that state to 8 bits once, and is started once:
what a decode step of a small model is made of. Products of floats gain nothing by it (measured: 30 layers of 576, equal
within the noise), and their weights would be written a second time during a build.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.lowering.nibbles import packed_bytes
from llava_deploy.engines.lowering.nodes import NodeList, constant_shape

_Kind: TypeAlias = "tuple[object, ...]"
"""Linear layers of one kind can be put together."""

_PACKED = (ir.DataType.INT4, ir.DataType.UINT4)


class FuseLinears(ir.passes.InPlacePass):
    """``MatMul(x, w_1), MatMul(x, w_2), …`` become ``Split(MatMul(x, [w_1 w_2 …]))``.

    Covers weights that are ``DequantizeLinear`` of constants ``[in, out]``, in blocks along axis 0, or with one scale a
    column, each used once; with an even number of outputs where two values share a byte. Only weights of one dtype and
    one form of scales are put together. Anything else is left as it is. Biases are added to the parts.

    Ensures: each result under its name; every column of the weight is exactly what it was. Fused weights are computed
    when they are read, one at a time, of tensors that may be external data.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        alike: dict[tuple[ir.Value, _Kind], list[_Linear]] = {}
        for node in graph:
            linear = _linear(node)
            if linear is not None:
                alike.setdefault((linear.x, linear.kind), []).append(linear)
        groups = [linears for linears in alike.values() if len(linears) > 1]
        for linears in groups:
            _fuse(graph, linears)
        return ir.passes.PassResult(model, modified=bool(groups))


@dataclass(frozen=True)
class _Linear:
    product: ir.Node
    dequantize: ir.Node
    x: ir.Value
    constants: tuple[ir.Value, ...]
    """Weight, scales and, where it has them, zero points; columns last."""
    kind: _Kind

    @property
    def outputs(self) -> int:
        return _sizes(self.constants[0])[-1]


def _linear(node: ir.Node) -> _Linear | None:
    """The linear layer whose product ``node`` is, where the rule covers it."""
    if (node.domain, node.op_type) != ("", "MatMul") or node.outputs[0].is_graph_output():
        return None
    x, weight = node.inputs
    dequantize = None if weight is None else weight.producer()
    if x is None or weight is None or dequantize is None or len(weight.uses()) > 1:
        return None
    if (dequantize.domain, dequantize.op_type) != ("", "DequantizeLinear"):
        return None
    constants = tuple(value for value in dequantize.inputs if value is not None)
    if len(constants) != len(dequantize.inputs) or any(
        constant_shape(value) is None or len(value.uses()) > 1 for value in constants
    ):
        return None
    sizes = _sizes(constants[0])
    axis = dequantize.attributes.get_int("axis", 1)
    is_blocked = axis == 0 and all(len(_sizes(value)) == 2 for value in constants)
    is_by_column = axis in (1, -1) and all(_sizes(value) == sizes[1:] for value in constants[1:])
    if len(sizes) != 2 or not (is_blocked or is_by_column) or (constants[0].dtype in _PACKED and sizes[1] % 2):
        return None
    form = tuple(sorted((name, str(attribute.value)) for name, attribute in dequantize.attributes.items()))
    return _Linear(node, dequantize, x, constants, (form, sizes[0], *(value.dtype for value in constants)))


def _sizes(value: ir.Value) -> tuple[int, ...]:
    return constant_shape(value) or ()


def _fuse(graph: ir.Graph, linears: Sequence[_Linear]) -> None:
    """The product stands where the first of them stood: what it reads is there, and all that read it come later."""
    first = linears[0]
    name = f"{first.constants[0].name}.fused"
    op = NodeList(graph, name)
    parts = zip(*(linear.constants for linear in linears), strict=True)
    constants = [op.initializer(f"constant_{i}", _beside([*values])) for i, values in enumerate(parts)]
    dequantize = ir.node("DequantizeLinear", constants, first.dequantize.attributes, name=f"{name}.weight")
    dequantize.outputs[0].name = f"v_{name}.weight"
    product = ir.node("MatMul", [first.x, dequantize.outputs[0]], name=f"{name}.product")
    product.outputs[0].name = f"v_{name}.product"
    sizes = op.integers([linear.outputs for linear in linears])
    results = [ir.Value(type=each.type, shape=each.shape) for each in (linear.product.outputs[0] for linear in linears)]
    split = ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, outputs=results, name=f"{name}.split")
    graph.insert_before(first.product, [dequantize, product, split])
    for linear, result in zip(linears, results, strict=True):
        (old,) = linear.product.outputs
        for user, index in [*old.uses()]:
            user.replace_input_with(index, result)
        graph.remove([linear.product, linear.dequantize], safe=True)
        old.name, result.name = None, old.name
        for value in linear.constants:
            del graph.initializers[str(value.name)]


def _beside(values: Sequence[ir.Value]) -> ir.LazyTensor:
    """Constants of one dtype, put together along their last axis."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    dtype, shape = tensors[0].dtype, (*shapes[0][:-1], sum(each[-1] for each in shapes))

    def compute() -> ir.TensorProtocol:
        if dtype not in _PACKED:
            return ir.tensor(np.concatenate([np.asarray(tensor.numpy()) for tensor in tensors], axis=-1))
        rows = [packed_bytes(tensor).reshape(-1, size[-1] // 2) for tensor, size in zip(tensors, shapes, strict=True)]
        return ir.PackedTensor(np.concatenate(rows, axis=1).reshape(-1), dtype, shape=ir.Shape(shape))

    return ir.LazyTensor(compute, dtype, ir.Shape(shape))

"""Zero points away: an asymmetric int4 weight becomes a symmetric one and a small product with group means.

TensorRT takes ``DequantizeLinear`` without zero points only. With ``q`` unsigned, ``q - 8`` is the same nibble as a
signed one with its top bit flipped, and for every group of rows that share a scale ``s`` and a zero point ``z``

    x · (q − z) s  =  x · (q − 8) s  +  sum(x) · (8 − z) s

In float16 that form is poor: where a group's values lie near a zero point of 0 or 15 both terms are many times their
sum, and each is rounded before they are added. So the group's mean ``m`` is taken off the activations first, and
``x' = x − m`` meets the weight:

    x · (q − z) s  =  x' · (q − 8) s  +  sum(x') · (8 − z) s  +  m · sum(q − z) s

Both large terms are now parts of the result that do not cancel. ``x'`` is rounded to the weight's float type, so
``sum(x')`` is that rounding's error and not zero; it is measured and goes in, and ``m − mean(x')`` is what the rounded
``x'`` leaves of the group's mean. Means and sums are float32; the last two terms are one product with two rows a group.

Norm-wise relative error against the zero-point form, both in float16 with float32 accumulation, worst of 1,050 draws
for each line (512 inputs, 32 outputs, 2 rows; activations normal, with outliers of 20 to 100 times, or with such
outliers of one sign; simulated in NumPy, every operator's result rounded):

    weights                                                group   plain form   this form
    normal                                                    32       7.1e-4      7.5e-4
    normal                                                   128       6.6e-4      8.0e-4
    groups of one sign (zero points 0 and 15)                 32      1.14e-3      8.6e-4
    groups of one sign (zero points 0 and 15)                128      1.02e-3      8.8e-4
    Student's t with 2.5 degrees of freedom                   32       8.1e-3     1.01e-3
    Student's t with 2.5 degrees of freedom                  128       4.6e-3      1.6e-3
    normal, each group's first 20 deviations to one side      32       5.6e-3     1.96e-3
    normal, each group's first 20 deviations to one side     128       6.1e-3      2.1e-3

What is left in the last lines is the rounding of ``(q − 8) s`` to float16 beside a ``(q − z) s`` of a step or none,
which any symmetric form has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.errors import BundleError
from llava_deploy.engines.lowering.nibbles import FlippedNibbles, group_sums, packed_bytes
from llava_deploy.engines.lowering.nodes import NodeList
from llava_deploy.engines.nibbles import unpack_nibbles

_ROWS = 16  # a group's size is a multiple of it

_Groups: TypeAlias = "tuple[ir.Value, ir.Value]"
"""Centred activations ``[…, K]`` and two numbers a group, ``[…, 2 * groups]``."""


class LowerZeroPoints(ir.passes.InPlacePass):
    """``MatMul(x, DequantizeLinear(uint4, scale, zero_point))`` becomes a symmetric product plus group terms.

    Requires: every ``DequantizeLinear`` with a zero point is of constant UINT4 ``[K, N]``, N even, in blocks along
    axis 0 of a multiple of 16 rows, and the second input of one ``MatMul``, whose first has a known rank. Weights may
    be external data: nothing is read here but when the tensors of the result are.

    Ensures: no ``DequantizeLinear`` has a zero point. Products of one input with groups of one size share what is
    computed of its groups; symmetric weights, other operators and the names of all results are as they were.
    """

    def requires(self, model: ir.Model) -> None:
        """Every zero point is one that the rule covers."""
        for node in model.graph:
            if _has_zero_points(node):
                problem = _problem(node)
                if problem is not None:
                    name = node.inputs[0].name if node.inputs[0] is not None else node.name
                    raise ir.passes.PreconditionError(f"weight {name!r}: its zero points cannot be lowered: {problem}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; the new weights are computed when they are read."""
        shared: dict[tuple[ir.Value, int], _Groups] = {}
        linears = [*_linears(model.graph)]
        for linear in linears:
            key = (linear.x, linear.group_size)
            if key not in shared:
                shared[key] = _group_means(model.graph, linear)
            _lower(model.graph, linear, shared[key])
        return ir.passes.PassResult(model, modified=bool(linears))

    def ensures(self, model: ir.Model) -> None:
        """None is left, in subgraphs neither."""
        left = next((node for node in ir.traversal.RecursiveGraphIterator(model.graph) if _has_zero_points(node)), None)
        if left is not None:
            raise ir.passes.PostconditionError(f"node {left.name!r}: has a zero point still")


@dataclass(frozen=True)
class _Linear:
    product: ir.Node
    dequantize: ir.Node
    x: ir.Value
    x_axes: int
    weight: ir.Value
    scale: ir.Value
    tensors: tuple[ir.TensorProtocol, ir.TensorProtocol, ir.TensorProtocol]
    """Values of the weight ``[K, N]``; scales and zero points ``[groups, N]``."""

    @property
    def group_size(self) -> int:
        return _block_size(self.dequantize)

    @property
    def rows(self) -> int:
        return self.tensors[0].shape.numpy()[0]


def _has_zero_points(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and len(node.inputs) > 2 and node.inputs[2] is not None


def _problem(node: ir.Node) -> str | None:
    """Why the rule does not cover a ``DequantizeLinear`` with a zero point."""
    weight, *others = node.inputs
    if weight is None or any(v is None or v.const_value is None or v.is_graph_input() for v in node.inputs):
        return "weight, scale and zero point must be constants"
    shape = () if weight.shape is None else weight.shape.numpy()
    if weight.dtype != ir.DataType.UINT4 or len(shape) != 2 or shape[1] % 2:
        return f"want UINT4 of two axes, the second even, got {weight.dtype} {weight.shape}"
    block, (rows, columns) = _block_size(node), shape
    if node.attributes.get_int("axis", 1) != 0 or block < _ROWS or block % _ROWS or rows % block:
        return f"want blocks on axis 0 of a multiple of {_ROWS} rows that divides {rows}, got blocks of {block}"
    if any(v is None or v.shape != (rows // block, columns) for v in others):
        return f"want scales and zero points of shape {(rows // block, columns)}"
    uses = [*node.outputs[0].uses()]
    if len(uses) != 1 or len(weight.uses()) != 1 or node.outputs[0].is_graph_output():
        return f"want one product with it, got {len(uses)} uses of its values and {len(weight.uses())} of its weight"
    product, index = uses[0]
    x = product.inputs[0]
    if product.op_type != "MatMul" or index != 1 or x is None or x.shape is None:
        return f"want the second input of a MatMul whose first has a known rank, got input {index} of {product.op_type}"
    return None


def _block_size(node: ir.Node) -> int:
    return node.attributes.get_int("block_size", 0)


def _linears(graph: ir.Graph) -> Iterator[_Linear]:
    """In the order of the products, so that the first one's place is before all that share its input."""
    for product in graph:
        if product.op_type != "MatMul" or product.inputs[1] is None:
            continue
        x, dequantize = product.inputs[0], product.inputs[1].producer()
        if dequantize is None or x is None or x.shape is None or not _has_zero_points(dequantize):
            continue
        weight, scale, zero_point = (value for value in dequantize.inputs if value is not None)
        values, scales, zeros = weight.const_value, scale.const_value, zero_point.const_value
        if values is not None and scales is not None and zeros is not None:
            yield _Linear(product, dequantize, x, len(x.shape), weight, scale, (values, scales, zeros))


def _group_means(graph: ir.Graph, linear: _Linear) -> _Groups:
    x, group_size, dtype = linear.x, linear.group_size, linear.scale.dtype
    leading = [0] * (linear.x_axes - 1)  # a 0 in Reshape's shape: as it was
    groups = linear.rows // group_size
    blocks, flat, pairs = [*leading, groups, group_size], [*leading, linear.rows], [*leading, 2 * groups]
    op = NodeList(graph, f"{x.name}.groups_of_{group_size}")
    wide = op.add("Reshape", op.cast(x, dtype, ir.DataType.FLOAT), op.integers(blocks))  # […, groups, group_size]
    mean = op.add("ReduceMean", wide, op.integers([-1]), keepdims=1)  # […, groups, 1]
    centred = op.cast(op.add("Sub", wide, mean), ir.DataType.FLOAT, dtype)
    rest = op.cast(centred, dtype, ir.DataType.FLOAT)
    rest = op.add("ReduceSum", rest, op.integers([-1]), keepdims=1)  # […, groups, 1]
    shift = op.add("Sub", mean, op.add("Mul", rest, op.float32(1 / group_size)))  # […, groups, 1]
    both = op.add("Concat", rest, shift, axis=-1)  # […, groups, 2]
    terms = op.cast(op.add("Reshape", both, op.integers(pairs)), ir.DataType.FLOAT, dtype)
    result = op.add("Reshape", centred, op.integers(flat)), terms
    op.insert_before(linear.product)
    return result


def _lower(graph: ir.Graph, linear: _Linear, groups: _Groups) -> None:
    """The product's node becomes the sum, so that its result keeps its name and its users."""
    centred, means = groups
    weight, zero_point = linear.weight, linear.dequantize.inputs[2]
    op = NodeList(graph, f"{weight.name}.lowered")
    terms = op.initializer("group_terms", _group_terms(*linear.tensors, linear.group_size))
    weight.const_value, weight.dtype = FlippedNibbles(linear.tensors[0]), ir.DataType.INT4
    symmetric = op.add("DequantizeLinear", weight, linear.scale, axis=0, block_size=linear.group_size)
    product = op.add("MatMul", centred, symmetric)
    correction = op.add("MatMul", means, terms)
    op.insert_before(linear.product)
    linear.product.op_type = "Add"
    linear.product.name = f"{weight.name}.lowered.sum"
    linear.product.replace_input_with(0, product)
    linear.product.replace_input_with(1, correction)
    graph.remove(linear.dequantize, safe=True)
    if zero_point is not None and not zero_point.uses():
        del graph.initializers[str(zero_point.name)]


def _group_terms(
    weight: ir.TensorProtocol, scale: ir.TensorProtocol, zero_point: ir.TensorProtocol, group_size: int
) -> ir.LazyTensor:
    """What a group's two numbers meet, ``[2 * groups, N]``: rows of ``(8 - z) s`` and ``sum(q - z) s`` in turn."""
    rows, columns = weight.shape.numpy()
    groups = rows // group_size

    def compute() -> ir.TensorProtocol:
        scales = np.asarray(scale.numpy())  # [groups, columns]
        sums = group_sums(packed_bytes(weight).reshape(rows, columns // 2), group_size)
        zeros = unpack_nibbles(packed_bytes(zero_point).reshape(groups, columns // 2)).astype(np.float32)
        terms = np.empty((groups, 2, columns), scales.dtype)
        with np.errstate(over="ignore"):
            terms[:, 0] = (8 - zeros) * scales
            terms[:, 1] = (sums - zeros * group_size) * scales
        if not np.isfinite(terms).all():
            raise BundleError(
                f"weight {weight.name!r}: its scales, up to {np.abs(scales).max():g}, are too large for the sums over "
                f"groups of {group_size} to stay in the range of {scales.dtype}; use a smaller group size"
            )
        return ir.tensor(terms.reshape(2 * groups, columns))

    return ir.LazyTensor(compute, scale.dtype, ir.Shape([2 * groups, columns]))

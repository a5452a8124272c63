"""Linear layers in 8-bit integers: weights with one scale a column, activations with one a row, found as it runs.

A processor with dot products of 8-bit integers (VNNI on x86) multiplies four of them in the time of one float. ONNX
Runtime's ``MatMulNBits`` rounds activations to 8 bits too, but in short blocks, each with a scale of its own to apply
inside the product: over 197 to 233 rows it does 120 to 164 thousand million operations a second on one core, floats do
108, and these products 325 to 350 (1.32, a Zen 4 core, minima). That is for many rows; a single one is bound by the
bytes of the weight, of which int4 has half. See docs/performance.md.

The form is that of W8A8 with dynamic quantisation (Dettmers et al., LLM.int8(), 2022, section 2.1, "vector-wise").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import NodeList, constant_shape

_DOMAIN = "com.microsoft"
_LARGEST = 127
_ZERO_POINT = 128
"""Activations are unsigned around it: what the processors' instructions want beside signed weights."""

_SMALLEST_SCALE = 1e-30
"""Of a row of zeros, which must not be divided by zero."""

_Weight: TypeAlias = "tuple[ir.Value, ...]"


class RoundLinearsToInt8(ir.passes.InPlacePass):
    """``MatMul(x, w)`` becomes ``MatMulIntegerToFloat(round(x / r), round(w / s)) * r``.

    Covers float32 ``x [..., in]`` and weights ``[in, out]`` that are a constant, the Transpose of one, or
    ``DequantizeLinear`` of constants: in blocks along axis 0, or with one scale a column, with or without zero points.
    ``s[out]`` is the largest magnitude of a column over 127, ``r`` that of a row of ``x``, so that nothing is clipped.
    Products of ``x`` with several weights round it once. Anything else is left as it is.

    Requires: float32 throughout (:class:`~llava_deploy.engines.lowering.float32.WidenFloats`). Of whoever runs it: a
    processor whose products of unsigned and signed 8-bit integers do not saturate
    (:func:`~llava_deploy.engines.processor.has_int8_products`).

    Ensures: each result under its name; of a result's row, the error's standard deviation is some 1 % of the values'
    for normally distributed ``x`` and ``w``, more where a row or a column has outliers. Weights are computed when they
    are read, one at a time, of tensors that may be external data.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        by_input: dict[ir.Value, list[_Linear]] = {}
        for node in graph:
            linear = _linear(node)
            if linear is not None:
                by_input.setdefault(linear.x, []).append(linear)
        if by_input:
            graph.opset_imports.setdefault(_DOMAIN, 1)
        roundings: dict[_Weight, tuple[ir.Value, ir.Value]] = {}
        leading = _Leading()
        for linears in by_input.values():
            rounded = _round_rows(graph, linears, leading)
            for linear in linears:
                _lower(graph, linear, rounded, roundings)
        return ir.passes.PassResult(model, modified=bool(by_input))


@dataclass(frozen=True)
class _Linear:
    product: ir.Node
    maker: ir.Node | None
    """What makes the weight of :attr:`constants`; ``None`` where it is a constant itself."""
    constants: _Weight

    @property
    def x(self) -> ir.Value:
        """What is multiplied now: where it was a linear layer's result itself, what has taken its place."""
        (x, _) = self.product.inputs
        if x is None:
            raise ir.passes.InvariantError(f"{self.product.name!r}: want two inputs")
        return x


@dataclass(frozen=True)
class _Rows:
    """``x`` in integers, ``[…, in]``, and the scales of its rows, ``[…, 1]``."""

    integers: ir.Value
    scales: ir.Value


def _linear(node: ir.Node) -> _Linear | None:
    """The linear layer whose product ``node`` is, where the rule covers it."""
    if (node.domain, node.op_type) != ("", "MatMul"):
        return None
    x, weight = node.inputs
    if x is None or weight is None or x.dtype != ir.DataType.FLOAT or x.const_value is not None:
        return None
    if constant_shape(weight) is not None:
        return _Linear(node, None, (weight,)) if _is_float_matrix(weight) else None
    maker = weight.producer()
    if maker is None or maker.domain != "":
        return None
    constants = tuple(value for value in maker.inputs if value is not None and constant_shape(value) is not None)
    if len(constants) != len(maker.inputs):
        return None
    if maker.op_type == "Transpose":
        turned = tuple(maker.attributes.get_ints("perm", [1, 0])) == (1, 0)
        return _Linear(node, maker, constants) if turned and _is_float_matrix(constants[0]) else None
    return _Linear(node, maker, constants) if _is_dequantized(maker, constants) else None


def _is_float_matrix(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT and len(constant_shape(value) or ()) == 2


def _is_dequantized(node: ir.Node, constants: _Weight) -> bool:
    if node.op_type != "DequantizeLinear" or len(constants) < 2 or constants[1].dtype != ir.DataType.FLOAT:
        return False
    sizes, others = constant_shape(constants[0]) or (), [constant_shape(value) or () for value in constants[1:]]
    axis = node.attributes.get_int("axis", 1)
    if len(sizes) != 2:
        return False
    is_blocked = axis == 0 and all(len(each) == 2 and sizes[0] % each[0] == 0 for each in others)
    return is_blocked or (axis in (1, -1) and all(each == sizes[1:] for each in others))


class _Leading:
    """The sizes of activations but the last. Most of a graph have the same: what follows from them is made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def zero_points(self, op: NodeList, x: ir.Value, by_row: ir.Value) -> ir.Value:
        """One for each row: QuantizeLinear wants as many as there are scales."""
        key = (*_sizes(x), "zero points")
        if key not in self._made:
            zero = op.scalar(_ZERO_POINT, ir.DataType.UINT8)
            self._made[key] = op.add("Expand", zero, op.add("Shape", by_row))
        return self._made[key]

    def restored(self, op: NodeList, x: ir.Value, rows: ir.Value, last: int) -> ir.Value:
        """``rows``, as many as ``x`` has, in its axes but for the last, which has this size."""
        sizes = _sizes(x)
        if sum(not isinstance(size, int) for size in sizes) < 2:
            return op.add("Reshape", rows, op.integers([*(s if isinstance(s, int) else -1 for s in sizes), last]))
        leading, key = (*sizes, "leading"), (*sizes, last)
        if leading not in self._made:
            self._made[leading] = op.add("Shape", x, start=0, end=-1)
        if key not in self._made:
            self._made[key] = op.add("Concat", self._made[leading], op.integers([last]), axis=0)
        return op.add("Reshape", rows, self._made[key])


def _sizes(x: ir.Value) -> tuple[object, ...]:
    """Sizes but the last, numbers or names; what only ``x`` has where one is neither."""
    sizes = () if x.shape is None else tuple(s if isinstance(s, int) else s.value for s in x.shape)[:-1]
    return (x, None) if None in sizes or not sizes else sizes


def _round_rows(graph: ir.Graph, linears: Sequence[_Linear], leading: _Leading) -> _Rows:
    x = linears[0].x
    op = NodeList(graph, f"{x.name}.int8")
    width = _columns(linears[0], 0)
    flat = op.add("Reshape", x, op.integers([-1, width]))
    largest = op.add("ReduceMax", op.add("Abs", flat), op.integers([-1]), keepdims=0)
    by_row = op.add("Max", op.add("Mul", largest, op.float32(1 / _LARGEST)), op.float32(_SMALLEST_SCALE))  # [rows]
    rounded = op.add("QuantizeLinear", flat, by_row, leading.zero_points(op, x, by_row), axis=0)  # [rows, in]
    rows = _Rows(leading.restored(op, x, rounded, width), leading.restored(op, x, by_row, 1))
    op.insert_before(linears[0].product)
    return rows


def _lower(graph: ir.Graph, linear: _Linear, rows: _Rows, roundings: dict[_Weight, tuple[ir.Value, ir.Value]]) -> None:
    op = NodeList(graph, f"{linear.product.outputs[0].name}.int8")
    if linear.constants not in roundings:
        rounding = _Rounding(linear)
        roundings[linear.constants] = (
            op.initializer("weight", ir.LazyTensor(rounding.weight, ir.DataType.INT8, ir.Shape(rounding.shape))),
            op.initializer("scale", ir.LazyTensor(rounding.scale, ir.DataType.FLOAT, ir.Shape(rounding.shape[1:]))),
        )
    weight, scale = roundings[linear.constants]
    one, zero = op.float32(1.0), op.scalar(_ZERO_POINT, ir.DataType.UINT8)
    product = op.add_of(_DOMAIN, "MatMulIntegerToFloat", rows.integers, weight, one, scale, zero)
    op.take_place_of(linear.product, op.add("Mul", product, rows.scales))
    if linear.maker is not None and not linear.maker.outputs[0].uses():
        graph.remove(linear.maker, safe=True)
    for value in linear.constants:
        if not value.uses():
            graph.initializers.pop(str(value.name), None)


def _columns(linear: _Linear, axis: int) -> int:
    """A size of the weight ``[in, out]``."""
    sizes = constant_shape(linear.constants[0]) or ()
    is_turned = linear.maker is not None and linear.maker.op_type == "Transpose"
    return sizes[1 - axis] if is_turned else sizes[axis]


class _Rounding:
    """A weight as integers and scales; the floats are made once, where the weight is read before its scales."""

    def __init__(self, linear: _Linear) -> None:
        self._linear = linear
        self._tensors = [value.const_value for value in linear.constants if value.const_value is not None]
        self._scale: np.ndarray | None = None
        self.shape = (_columns(linear, 0), _columns(linear, 1))

    def weight(self) -> ir.TensorProtocol:
        """int8 ``[in, out]``."""
        floats = self._floats()
        self._scale = _scales(floats)
        floats /= self._scale
        return ir.tensor(np.rint(floats, out=floats).astype(np.int8))

    def scale(self) -> ir.TensorProtocol:
        """float32 ``[out]``."""
        if self._scale is None:
            self._scale = _scales(self._floats())
        return ir.tensor(self._scale)

    def _floats(self) -> np.ndarray:
        """float32 ``[in, out]``, a copy."""
        arrays = [np.asarray(tensor.numpy()).astype(np.float32) for tensor in self._tensors]
        maker = self._linear.maker
        if maker is None:
            return arrays[0]
        if maker.op_type == "Transpose":
            return np.ascontiguousarray(arrays[0].T)
        weight, scale, *zero_points = arrays
        if scale.ndim == 1:
            return (weight - zero_points[0]) * scale if zero_points else weight * scale
        blocks = weight.reshape(scale.shape[0], -1, scale.shape[1])  # [blocks, block, out], a view
        if zero_points:
            blocks -= zero_points[0][:, None]
        blocks *= scale[:, None]
        return weight


def _scales(floats: np.ndarray) -> np.ndarray:
    largest = np.maximum(floats.max(axis=0), -floats.min(axis=0))
    scales: np.ndarray = np.where(largest > 0, largest / np.float32(_LARGEST), np.float32(1))
    return scales

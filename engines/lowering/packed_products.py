"""Products with int4 weights become ONNX Runtime's MatMulNBits, their weights in the order that it reads.

ONNX Runtime puts ``DequantizeLinear`` and ``MatMul`` together itself, whenever it loads a graph: it transposes every
weight on the host, seconds and gigabytes. Where that is done once, by the build, a session maps the weights and hands
them on. What a session computes is the same: the operator, its attributes and its constants are those that ONNX Runtime
1.32 makes, byte for byte (a test holds them against each other).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.lowering.nibbles import packed_bytes
from llava_deploy.engines.lowering.nodes import NodeList, constant_shape
from llava_deploy.engines.names import DEFAULT_ACCURACY_LEVEL
from llava_deploy.engines.nibbles import pack_nibbles, unpack_nibbles

_DOMAIN = "com.microsoft"
_LEAST_BLOCK = 16  # a power of two from here on: what the operator takes


class PackProducts(ir.passes.InPlacePass):
    """``MatMul(x, DequantizeLinear(weight, scales[, zero_points]))`` becomes ``MatMulNBits``.

    Covers constants: unsigned 4-bit weights ``[in, out]`` with zero points, or signed ones without, in blocks along
    axis 0 whose size is a power of two, 16 or more, and divides ``in``; ``out`` even; each used once. Anything else is
    left as it is.

    Ensures: each product under its name; values of weights are exactly what they were. Constants are computed when they
    are read, one at a time, of tensors that may be external data.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph."""
        graph = model.graph
        products = [product for node in graph if (product := _product(node)) is not None]
        for product in products:
            _pack(graph, product)
        if products:
            graph.opset_imports.setdefault(_DOMAIN, 1)
        return ir.passes.PassResult(model, modified=bool(products))


@dataclass(frozen=True)
class _Product:
    matmul: ir.Node
    dequantize: ir.Node
    constants: tuple[ir.TensorProtocol, ...]
    """Weight, scales and, where it has them, zero points."""
    inputs: int
    outputs: int
    block: int


def _product(node: ir.Node) -> _Product | None:
    """The product, where the rule covers it."""
    if (node.domain, node.op_type) != ("", "MatMul") or None in node.inputs:
        return None
    weight = node.inputs[1]
    dequantize = None if weight is None else weight.producer()
    if weight is None or dequantize is None or (dequantize.domain, dequantize.op_type) != ("", "DequantizeLinear"):
        return None
    values = [value for value in dequantize.inputs if value is not None]
    constants = tuple(value.const_value for value in values if value.const_value is not None)
    sizes = constant_shape(values[0])
    block = dequantize.attributes.get_int("block_size", 0)
    if len(weight.uses()) > 1 or dequantize.attributes.get_int("axis", 1) != 0 or block < _LEAST_BLOCK:
        return None
    if any(constant_shape(value) is None or len(value.uses()) > 1 for value in values):
        return None
    kind, count = values[0].dtype, len(values)
    if (kind, count) not in ((ir.DataType.INT4, 2), (ir.DataType.UINT4, 3)) or sizes is None or len(sizes) != 2:
        return None
    inputs, outputs = sizes
    fits = block & (block - 1) == 0 and inputs % block == 0 and outputs % 2 == 0
    return _Product(node, dequantize, constants, inputs, outputs, block) if fits else None


def _pack(graph: ir.Graph, product: _Product) -> None:
    weight, scales, *zero_points = product.constants
    blocks = product.inputs // product.block
    width = -(-blocks // 2)
    shape = (product.outputs, blocks, product.block // 2)
    name = f"{weight.name}.packed"
    op = NodeList(graph, name)
    constants = [
        op.initializer("weight", _lazy(lambda: _packed_weight(weight, product), ir.DataType.UINT8, shape)),
        op.initializer("scales", _lazy(lambda: _by_output(scales), scales.dtype, (product.outputs * blocks,))),
    ]
    if zero_points:
        (points,) = zero_points
        codes = _lazy(lambda: _packed_points(points, blocks), ir.DataType.UINT8, (product.outputs * width,))
        constants.append(op.initializer("zero_points", codes))
    x = [value for value in product.matmul.inputs[:1] if value is not None]
    packed = op.add_of(
        _DOMAIN, "MatMulNBits", *x, *constants, K=product.inputs, N=product.outputs, bits=4, block_size=product.block,
        accuracy_level=DEFAULT_ACCURACY_LEVEL,
    )  # fmt: skip
    gone = [value for value in product.dequantize.inputs if value is not None]
    op.take_place_of(product.matmul, packed)
    graph.remove(product.dequantize, safe=True)
    for value in gone:
        del graph.initializers[str(value.name)]


def _lazy(compute: Callable[[], np.ndarray], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: ir.tensor(compute().reshape(shape)), dtype, ir.Shape(shape))


def _packed_weight(weight: ir.TensorProtocol, product: _Product) -> np.ndarray:
    """``[in, out]``, two outputs in a byte, to ``[out, in]``, two inputs in a byte; signed values get 8 added."""
    pairs = packed_bytes(weight).reshape(product.inputs, product.outputs // 2)
    if weight.dtype == ir.DataType.INT4:
        pairs = pairs ^ np.uint8(0x88)
    first, second = pairs[0::2], pairs[1::2]
    packed = np.empty((product.outputs, product.inputs // 2), np.uint8)
    packed[0::2] = ((first & 15) | (second << 4)).T
    packed[1::2] = ((first >> 4) | (second & 0xF0)).T
    return packed


def _by_output(scales: ir.TensorProtocol) -> np.ndarray:
    """``[blocks, out]`` to ``[out * blocks]``."""
    return np.ascontiguousarray(scales.numpy().T)


def _packed_points(points: ir.TensorProtocol, blocks: int) -> np.ndarray:
    """``[blocks, out]``, two outputs in a byte, to ``[out, blocks / 2]``, two blocks in a byte, the last filled up."""
    codes = unpack_nibbles(packed_bytes(points).reshape(blocks, -1)).T
    return pack_nibbles(np.pad(codes, ((0, 0), (0, blocks % 2))))

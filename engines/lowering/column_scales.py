"""8-bit weights with one scale a column get that scale once a block of rows: longer blocks than ONNX Runtime takes.

It fuses ``DequantizeLinear`` and ``MatMul`` into ``MatMulNBits``, whose scales go along the inputs in blocks. Scales
of columns it repeats for every 32 rows by itself. Repeated for every 128 or 64 by this pass, there are fewer to read
and to multiply by: a product of one row with 1024 × 32000 values took 1.43 ms in blocks of 128, 1.77 in blocks of 64
and 2.17 as ONNX Runtime repeats them (1.32, accuracy level 4, one thread, minima). The output layer of an int4 decoder
in 8 bits is such a product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import NodeList, constant_shape

_BLOCKS = (128, 64)
"""In order of preference. Blocks of 256 are as fast as of 128, and activations would be rounded more coarsely."""


class BlockColumnScales(ir.passes.InPlacePass):
    """``DequantizeLinear(int8 [K, N], scale [N], axis=1)`` gets ``scale [K / B, N]``, the same in each block of B rows.

    Covers symmetric int8 weights ``[K, N]`` with a constant scale a column, K a multiple of 64. Anything else, such as
    zero points, is left as it is. Tensors may be external data: they are read when those of the result are.

    Ensures: exactly the same weights. At accuracy level 4 activations are rounded to 8 bits in blocks as long as the
    weight's: the largest error of that product, in standard deviations of its result, was 0.025 in blocks of 32 and
    0.030 in blocks of 64 and 128.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; the scales are repeated when they are read."""
        nodes = [(node, rows) for node in model.graph if (rows := _covered_rows(node)) is not None]
        for node, rows in nodes:
            _lower(model.graph, node, rows)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _covered_rows(node: ir.Node) -> int | None:
    """K of a weight that the rule covers."""
    if (node.domain, node.op_type) != ("", "DequantizeLinear") or len(node.inputs) != 2:
        return None
    weight, scale = node.inputs
    sizes, columns = constant_shape(weight), constant_shape(scale)
    if weight is None or weight.dtype != ir.DataType.INT8 or sizes is None or len(sizes) != 2:
        return None
    if columns != sizes[1:] or node.attributes.get_int("axis", 1) not in (1, -1):
        return None
    return sizes[0] if any(sizes[0] % block == 0 for block in _BLOCKS) else None


def _lower(graph: ir.Graph, node: ir.Node, rows: int) -> None:
    weight, scale = node.inputs
    tensor = None if scale is None else scale.const_value
    if weight is None or scale is None or tensor is None:
        return
    block = next(size for size in _BLOCKS if rows % size == 0)
    shape = (rows // block, *tensor.shape.numpy())

    def compute() -> ir.TensorProtocol:
        return ir.tensor(np.broadcast_to(np.asarray(tensor.numpy()), shape).copy())

    repeated = NodeList(graph, f"{weight.name}.blocks").initializer(
        "scale", ir.LazyTensor(compute, tensor.dtype, ir.Shape(shape))
    )
    node.replace_input_with(1, repeated)
    node.attributes["axis"] = ir.AttrInt64("axis", 0)
    node.attributes["block_size"] = ir.AttrInt64("block_size", block)
    if not scale.uses():
        del graph.initializers[str(scale.name)]

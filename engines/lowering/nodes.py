"""Nodes that a pass adds to a graph, with names, and with constants that are there once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


class NodeList:
    """Collects nodes and puts them into a graph in one go; all names begin with ``prefix``."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix
        self._nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """A node with one output, which is returned."""
        name = f"{self._prefix}.{op_type}_{len(self._nodes)}"
        output = ir.Value(name=f"v_{name}")
        self._nodes.append(ir.node(op_type, inputs=inputs, attributes=attributes, outputs=[output], name=name))
        return output

    def cast(self, value: ir.Value, have: ir.DataType | None, want: ir.DataType | None) -> ir.Value:
        """``value``, of dtype ``have``, as ``want``; itself where they are the same."""
        return value if have == want or want is None else self.add("Cast", value, to=int(want))

    def integers(self, values: Sequence[int]) -> ir.Value:
        """An int64 constant of one axis."""
        name = "_".join(map(str, values))
        return self._constant(f"lowering.int64_{name}", np.array(values, np.int64))

    def float32(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self._constant(f"lowering.float32_{value!r}", np.array(value, np.float32))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new constant, ``{prefix}.{name}``."""
        tensor.name = f"{self._prefix}.{name}"
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def insert_before(self, node: ir.Node) -> None:
        """Put what was added into the graph, in front of ``node``."""
        self._graph.insert_before(node, self._nodes)
        self._nodes = []

    def _constant(self, name: str, values: np.ndarray) -> ir.Value:
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        value = ir.Value(
            name=name,
            shape=ir.Shape(values.shape),
            type=ir.TensorType(ir.DataType.from_numpy(values.dtype)),
            const_value=ir.tensor(values, name=name),
        )
        self._graph.register_initializer(value)
        return value

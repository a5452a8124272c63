"""Nodes that a pass adds to a graph, with names, and with constants that are there once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

_CACHE = ("past.", "present.")


def cache_values(graph: ir.Graph) -> list[ir.Value]:
    """A decoder's inputs and outputs that are its cache, ``[batch, kv_heads, slots, head_dim]``."""
    return [value for value in (*graph.inputs, *graph.outputs) if str(value.name).startswith(_CACHE)]


def constant_integers(value: ir.Value | None) -> list[int] | None:
    """What an integer constant holds; ``None`` where ``value`` is none."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return [int(size) for size in value.const_value.numpy().reshape(-1)]


def constant_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of a constant; ``None`` where ``value`` is none."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return (*value.const_value.shape.numpy(),)


def static_size(value: ir.Value, axis: int) -> int:
    """A size that a pass's ``requires`` has seen to be known.

    Raises:
        InvariantError: it is not.
    """
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ir.passes.InvariantError(f"value {value.name!r}: want a known size on axis {axis}, got {value.shape}")
    return size


def attribute_problem(node: ir.Node, **allowed: int | None) -> str | None:
    """What is wrong with a node's attributes; ``allowed`` are their only values, ``None`` for any."""
    for name, attribute in node.attributes.items():
        if name not in allowed:
            return f"it has an attribute {name}"
        if allowed[name] is not None and attribute.value != allowed[name]:
            return f"want {name} {allowed[name]}, got {attribute.value}"
    return None


def require_lowerable(model: ir.Model, op_type: str, problem_of: Callable[[ir.Node], str | None]) -> None:
    """Raise a :class:`PreconditionError` where ``problem_of`` has something to say of a node of that type."""
    for node in model.graph:
        if node.op_type == op_type and (problem := problem_of(node)) is not None:
            raise ir.passes.PreconditionError(f"{node.name!r}: {op_type} cannot be lowered: {problem}")


def lowered(model: ir.Model, op_type: str, lower: Callable[[ir.Graph, ir.Node], None]) -> ir.passes.PassResult:
    """Call ``lower`` for every node of that type in the graph, which takes its place."""
    nodes = [node for node in model.graph if node.op_type == op_type]
    for node in nodes:
        lower(model.graph, node)
    return ir.passes.PassResult(model, modified=bool(nodes))


def require_gone(model: ir.Model, op_type: str) -> None:
    """Raise a :class:`PostconditionError` where one is left, in the graph or a subgraph."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == op_type:
            raise ir.passes.PostconditionError(f"node {node.name!r}: {op_type} is there still")


class NodeList:
    """Collects nodes and puts them into a graph in one go; all names begin with ``prefix``."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix
        self._nodes: list[ir.Node] = []

    def add(self, op_type: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        """A node with one output, which is returned."""
        return self._add("", op_type, inputs, attributes)

    def add_of(self, domain: str, op_type: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        """A node of another domain than ONNX's own; as :meth:`add`."""
        return self._add(domain, op_type, inputs, attributes)

    def _add(
        self, domain: str, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, int | Sequence[int]]
    ) -> ir.Value:
        name = f"{self._prefix}.{op_type}_{len(self._nodes)}"
        output = ir.Value(name=f"v_{name}")
        node = ir.node(op_type, inputs=inputs, attributes=attributes, domain=domain, outputs=[output], name=name)
        self._nodes.append(node)
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
        return self.scalar(value, ir.DataType.FLOAT)

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A scalar of a float dtype."""
        kind = dtype.numpy()
        return self._constant(f"lowering.{kind}_{value!r}", np.array(value, kind))

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

    def take_place_of(self, node: ir.Node, result: ir.Value) -> None:
        """Put what was added in the place of ``node``; ``result``, one of it, becomes the node's output, name and all.

        Args:
            node: has one output.
            result: made by a node of this list.
        """
        (old,) = node.outputs
        graph, name = self._graph, old.name
        result.type, result.shape = old.type, old.shape
        self.insert_before(node)
        for user, index in [*old.uses()]:
            user.replace_input_with(index, result)
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = result
        graph.remove(node, safe=True)
        old.name, result.name = None, name

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

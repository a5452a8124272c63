"""Floats of 32 bits throughout: what a processor computes in, for graphs that say float16.

ONNX Runtime's CPU has few kernels for float16. Around every other operator it puts a cast to float32 and one back: in a
decode step of a small int4 decoder (30 layers) there are 397, more than of any other operator. Widened once, values
need no casts, and nothing is rounded to float16 in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from llava_deploy.engines.lowering.nibbles import ChunkedTensor, byte_chunks
from llava_deploy.engines.lowering.nodes import NodeList, cache_values

_NARROW, _WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT


class WidenFloats(ir.passes.InPlacePass):
    """Every float16 constant, value and cast becomes float32; the cache's inputs and outputs, too.

    Requires: no subgraphs, and no operator but Cast whose result's type an attribute names. Weights may be external
    data: they are read, some megabytes at a time, when those of the result are.

    Ensures: no value is float16 but the graph's other inputs and outputs, which keep their type, with a Cast behind or
    before them. Results differ by what float16 would have rounded. Whoever runs the graph binds a cache of float32.
    """

    def requires(self, model: ir.Model) -> None:
        """Nothing is out of the rule's reach."""
        for node in model.graph:
            kinds = {attribute.type for attribute in node.attributes.values()}
            if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
                raise ir.passes.PreconditionError(f"node {node.name!r}: {node.op_type} has a subgraph: widen it before")
            named = {"dtype", "output_dtype", "value"} & node.attributes.keys()
            if named or (node.op_type != "Cast" and "to" in node.attributes):
                raise ir.passes.PreconditionError(f"node {node.name!r}: want no {node.op_type} that names a type")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the graph; constants are widened when they are read."""
        graph = model.graph
        cache = cache_values(graph)
        inputs = [value for value in graph.inputs if value.dtype == _NARROW and value not in cache]
        outputs = [value for value in graph.outputs if value.dtype == _NARROW and value not in cache]
        constants = [value for value in graph.initializers.values() if value.dtype == _NARROW]
        made = [value for node in graph for value in node.outputs if value.dtype == _NARROW]
        if not constants and all(value.is_graph_output() for value in made):
            return ir.passes.PassResult(model, modified=False)
        for value in constants:
            if value.const_value is not None:
                value.const_value = _Widened(value.const_value)
        for node in graph:
            if node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(_NARROW):
                node.attributes["to"] = ir.AttrInt64("to", int(_WIDE))
        for value in (*constants, *made, *cache):
            value.dtype = _WIDE
        for value in inputs:
            _cast_input(graph, value)
        for value in outputs:
            _cast_output(graph, value)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Nothing inside is float16."""
        ends = {*model.graph.inputs, *model.graph.outputs} - {*cache_values(model.graph)}
        values = [*model.graph.initializers.values(), *cache_values(model.graph)]
        for value in (*values, *(value for node in model.graph for value in node.outputs)):
            if value.dtype == _NARROW and value not in ends:
                raise ir.passes.PostconditionError(f"value {value.name!r}: is float16 still")


class _Widened(ChunkedTensor):
    """A float16 tensor as float32."""

    def __init__(self, source: ir.TensorProtocol) -> None:
        super().__init__(self._whole, _WIDE, ir.Shape(source.shape.numpy()), name=source.name)
        self._source = source

    def chunks(self) -> Iterator[np.ndarray]:
        """The bytes, uint8, in pieces."""
        for chunk in byte_chunks(self._source):
            yield chunk.view(np.float16).astype(np.float32).view(np.uint8)

    def _whole(self) -> ir.TensorProtocol:
        return ir.tensor(np.asarray(self._source.numpy()).astype(np.float32), name=self.name)


def _cast_input(graph: ir.Graph, value: ir.Value) -> None:
    users = [*value.uses()]
    op = NodeList(graph, f"{value.name}.widened")
    wide = op.cast(value, _NARROW, _WIDE)
    wide.type, wide.shape = ir.TensorType(_WIDE), value.shape
    op.insert_before(graph[0])
    for user, index in users:
        user.replace_input_with(index, wide)


def _cast_output(graph: ir.Graph, value: ir.Value) -> None:
    name = str(value.name)
    value.name, value.dtype = f"{name}.wide", _WIDE
    node = ir.node("Cast", [value], {"to": int(_NARROW)}, name=f"{name}.narrowed")
    (narrow,) = node.outputs
    narrow.name, narrow.type, narrow.shape = name, ir.TensorType(_NARROW), value.shape
    graph.append(node)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = narrow

"""A cache of static length: what TensorRT wants of a buffer that it writes into."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.lowering.nodes import cache_values

_DIM = "max_len"
_AXIS = 2  # of [batch, kv_heads, max_len, head_dim]


class FixCacheLength(ir.passes.InPlacePass):
    """The dim ``max_len`` of every ``past.*`` and ``present.*``, and of all values with it, becomes a number.

    Requires: the graph's inputs and outputs are those of :class:`~llava_deploy.engines.contract.DecoderShape`, and
    their length is the dim ``max_len``, or that number already.

    Ensures: no value of the graph has the dim ``max_len``; nodes, names, weights and all other dims are as they were.
    The numbers that the graph computes do not depend on it.
    """

    def __init__(self, max_len: int) -> None:
        self._max_len = max_len

    def requires(self, model: ir.Model) -> None:
        """Inputs and outputs are a decoder's."""
        caches = cache_values(model.graph)
        if not caches:
            raise ir.passes.PreconditionError("want a decoder with a cache, found no input past.*")
        for value in caches:
            found = None if value.shape is None else value.shape[_AXIS]
            if found != _DIM and found != self._max_len:
                raise ir.passes.PreconditionError(f"cache {value.name!r}: want length {_DIM}, found {found}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the shapes."""
        changed = False
        for value in _values(model.graph):
            dims = () if value.shape is None else (*value.shape,)
            if _DIM in dims:
                value.shape = ir.Shape([self._max_len if dim == _DIM else dim for dim in dims])
                changed = True
        return ir.passes.PassResult(model, modified=changed)

    def ensures(self, model: ir.Model) -> None:
        """Caches have that length."""
        for value in cache_values(model.graph):
            if value.shape is None or value.shape[_AXIS] != self._max_len:
                raise ir.passes.PostconditionError(f"cache {value.name!r}: has shape {value.shape}")


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [value for node in ir.traversal.RecursiveGraphIterator(graph) for value in node.outputs]
    return [*graph.inputs, *graph.outputs, *made]

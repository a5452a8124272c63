"""A decoder cut at layer boundaries: a graph of some of its layers."""

from __future__ import annotations

import onnx_ir as ir

from llava_deploy.engines.contract import HIDDEN_STATES, hidden_state_name
from llava_deploy.engines.lowering.nodes import cache_values
from llava_deploy.engines.lowering.unused_inputs import DropUnusedInputs

_EMBEDS, _LOGITS = "inputs_embeds", "logits"


class TakeLayers(ir.passes.InPlacePass):
    """A decoder becomes some of its layers: ``hidden_states.{n}`` goes in where ``inputs_embeds`` did, and comes out.

    Requires: a decoder's graph as :class:`~llava_deploy.engines.contract.DecoderShape` describes it, without subgraphs;
    the hidden states before and after the layers go by their names (``hidden_state_name``).

    Ensures: inputs and outputs are those of :func:`~llava_deploy.engines.decoder_parts.part_spec`, in its order, and
    each input is used. What several layers share, such as what is computed of the mask, is in the graph as often as it
    was. Weights of other layers are gone, and those that are left refer to where they were. Parts that follow each
    other compute the decoder's numbers; all of the layers are the decoder as it was.
    """

    def __init__(self, layers: range) -> None:
        self._layers = layers

    def requires(self, model: ir.Model) -> None:
        """The layers are there, and the boundaries have their names."""
        count = _count_layers(model.graph)
        first, stop = self._layers.start, self._layers.stop
        if not 0 <= first < stop <= count:
            raise ir.passes.PreconditionError(f"want layers {first} to {stop - 1} of a decoder, found {count} layers")
        if not any(value.name == _EMBEDS for value in model.graph.inputs):
            raise ir.passes.PreconditionError(f"want a decoder with an input {_EMBEDS}")
        named = {str(value.name) for node in model.graph for value in node.outputs}
        for boundary in (first, stop):
            if 0 < boundary < count and hidden_state_name(boundary) not in named:
                raise ir.passes.PreconditionError(f"want a value {hidden_state_name(boundary)!r} to cut at, found none")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut what comes before the layers, and take what comes after them away."""
        graph, layers = model.graph, self._layers
        count = _count_layers(graph)
        if layers == range(count):
            return ir.passes.PassResult(model, modified=False)
        embeds = next(value for value in graph.inputs if value.name == _EMBEDS)
        results = [value for value in graph.outputs if _is_of(value, layers) or value.name == _LOGITS]
        if layers.stop < count:
            after = _hidden(graph, layers.stop)
            after.shape, after.type = embeds.shape, embeds.type
            results = [after, *(value for value in results if value.name != _LOGITS)]
        entry = embeds
        if layers.start > 0:
            before = _hidden(graph, layers.start)
            entry = ir.Value(name=before.name, shape=embeds.shape, type=embeds.type)
            before.replace_all_uses_with(entry)
        graph.outputs[:] = results
        graph.inputs[:] = [entry, *(value for value in graph.inputs if value is not entry)]
        DropUnusedInputs()(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Only these layers' caches are left, and nothing is asked for that nobody uses."""
        graph, layers = model.graph, self._layers
        for value in cache_values(graph):
            if not _is_of(value, layers):
                raise ir.passes.PostconditionError(f"cache {value.name!r}: is needed by layers {layers}")
        entry = _EMBEDS if layers.start == 0 else hidden_state_name(layers.start)
        hidden = [v.name for v in graph.inputs if v.name == _EMBEDS or str(v.name).startswith(HIDDEN_STATES)]
        if hidden != [entry]:
            raise ir.passes.PostconditionError(f"want hidden states to come in by {entry!r} alone, found {hidden}")
        unused = [value.name for value in graph.inputs if not value.uses()]
        if unused:
            raise ir.passes.PostconditionError(f"inputs {unused}: are used by nothing")


def _count_layers(graph: ir.Graph) -> int:
    return sum(str(value.name).startswith("past.") and str(value.name).endswith(".key") for value in graph.inputs)


def _is_of(value: ir.Value, layers: range) -> bool:
    """Whether it is a cache, ``past.{i}.key`` and so on, of one of them."""
    kind, _, rest = str(value.name).partition(".")
    return kind in ("past", "present") and int(rest.partition(".")[0]) in layers


def _hidden(graph: ir.Graph, count: int) -> ir.Value:
    name = hidden_state_name(count)
    return next(value for node in graph for value in node.outputs if value.name == name)

"""Whether the network that TensorRT's parser made is the one that the graph asks for.

A parser may take a construct for something else and say nothing, or no more than a warning: attention in pieces where
one fused layer was meant, weights turned into floats, a product in float32. All of it would build, and run, slowly or
wrong. So a network is held against what the model says, before any time is spent on building it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llava_deploy.engines.contract import GraphSpec, TensorSpec, past_name, present_name
from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.names import CacheForm
from llava_deploy.engines.tensorrt_module import DTYPES

_PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "ATTENTION_INPUT")
_OPERANDS = 2  # of a product; what an attention takes beside queries and keys has the same dtype
_MASK = 3  # ATTENTION_INPUT's inputs are queries, keys, values, mask
_SAID = 5  # differences in one message


@dataclass(frozen=True)
class ExpectedLayers:
    """What a network is to have, by TensorRT's names of layers.

    Attributes:
        attentions: fused attentions (``ATTENTION_INPUT``); 0 in the dialect for releases without one.
        mask: the network's input that each of them takes as its mask; ``None``: no mask.
        cache_updates: names of each ``KV_CACHE_UPDATE``'s cache and result, which are the network's own.
        int4: weights that enter through ``DEQUANTIZE`` of INT4 constants.
        int8: likewise of INT8.
    """

    attentions: int
    mask: str | None
    cache_updates: tuple[tuple[str, str], ...]
    int4: int
    int8: int


def expected_vision(attentions: int) -> ExpectedLayers:
    """Of a vision graph; ``attentions`` is how many nodes ``Attention`` the lowered graph has."""
    return ExpectedLayers(attentions, None, (), 0, 0)


def expected_decoder(layers: range, quantized: Mapping[int, int], cache: CacheForm) -> ExpectedLayers:
    """Of a decoder, or a part of one, with these layers; ``quantized`` is how many matrices have 4 bits, how many 8."""
    parts = [(i, part) for i in layers for part in ("key", "value")]
    in_place = cache == "in-place"
    return ExpectedLayers(
        attentions=len(layers) if in_place else 0,
        mask="attention_mask" if in_place else None,
        cache_updates=tuple((past_name(*part), present_name(*part)) for part in parts) if in_place else (),
        int4=quantized.get(4, 0),
        int8=quantized.get(8, 0),
    )


def with_sizes(spec: GraphSpec, sizes: Mapping[str, int]) -> GraphSpec:
    """``spec`` with fixed sizes in the place of named dims, as ``{"max_len": 2048}``."""

    def fixed(tensor: TensorSpec) -> TensorSpec:
        shape = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in tensor.shape)
        return dataclasses.replace(tensor, shape=shape)

    inputs, outputs = tuple(map(fixed, spec.inputs)), tuple(map(fixed, spec.outputs))
    return GraphSpec(spec.name, inputs, outputs, tuple(dim for dim in spec.dims if dim.name not in sizes))


def check_network(api: Any, network: Any, spec: GraphSpec, expected: ExpectedLayers) -> None:
    """Hold a parsed network against its contract and the layers that it is to have.

    Args:
        api: TensorRT's module.
        network: an ``INetworkDefinition``, parsed.
        spec: the contract, with fixed sizes where the lowered graph has them (:func:`with_sizes`).
        expected: what the model says.

    Raises:
        BackendError: an input or output has another name, dtype or shape, or nobody takes it; another number of
            attentions, cache updates or quantised weights; a plugin; a product in another dtype than the graph's.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [
        *_differing_bindings(api, network, spec),
        *_unused_inputs(network, layers),
        *_differing_counts(layers, expected),
        *_wrong_caches(layers, expected),
        *_wrong_masks(layers, expected),
        *_wrong_products(layers, DTYPES[spec.inputs[0].dtype]),
    ]
    if found:
        more = "" if len(found) <= _SAID else f"; and {len(found) - _SAID} more"
        raise BackendError(
            f"graph {spec.name!r}: TensorRT {api.__version__} has read another network than was written: "
            f"{'; '.join(found[:_SAID])}{more}; build with another version of TensorRT, or with ONNX Runtime"
        )


def _differing_bindings(api: Any, network: Any, spec: GraphSpec) -> Iterator[str]:
    inputs = {value.name: value for value in map(network.get_input, range(network.num_inputs))}
    outputs = {value.name: value for value in map(network.get_output, range(network.num_outputs))}
    for kind, wanted, values in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        for name in sorted(values.keys() - {tensor.name for tensor in wanted}):
            yield f"{kind} {name!r} is not in the contract"
        for tensor in wanted:
            if tensor.name not in values:
                yield f"{kind} {tensor.name!r} is missing"
                continue
            value = values[tensor.name]
            shape = _named_shape(value) if kind == "input" else tuple(value.shape)
            want = tuple(-1 if isinstance(size, str) and kind == "output" else size for size in tensor.shape)
            if value.dtype != getattr(api.DataType, DTYPES[tensor.dtype]) or shape != want:
                yield f"{kind} {tensor.name!r} is {value.dtype.name}{list(shape)}, want {tensor}"


def _named_shape(value: Any) -> tuple[int | str, ...]:
    """Names of the dynamic axes, which the parser keeps for a network's inputs."""
    sizes: list[int | str] = list(value.shape)
    for axis, size in enumerate(sizes):
        if size == -1:
            sizes[axis] = value.get_dimension_name(axis) or "?"
    return tuple(sizes)


def _inputs(layer: Any) -> list[Any]:
    """Its tensors; an input that may be left out is ``None``."""
    return [layer.get_input(index) for index in range(layer.num_inputs)]


def _unused_inputs(network: Any, layers: list[Any]) -> Iterator[str]:
    taken = {value.name for layer in layers for value in _inputs(layer) if value is not None}
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name not in taken:
            yield f"input {name!r} is used by no layer"


def _differing_counts(layers: list[Any], expected: ExpectedLayers) -> Iterator[str]:
    kinds = Counter(layer.type.name for layer in layers)
    constants = {layer.get_output(0).name for layer in layers if layer.type.name == "CONSTANT"}
    weights = Counter(
        layer.get_input(0).dtype.name
        for layer in layers
        if layer.type.name == "DEQUANTIZE" and layer.get_input(0).name in constants
    )
    for what, want, got in (
        ("ATTENTION_INPUT layers", expected.attentions, kinds["ATTENTION_INPUT"]),
        ("KV_CACHE_UPDATE layers", len(expected.cache_updates), kinds["KV_CACHE_UPDATE"]),
        ("weights through DEQUANTIZE of INT4", expected.int4, weights["INT4"]),
        ("weights through DEQUANTIZE of INT8", expected.int8, weights["INT8"]),
        ("DEQUANTIZE layers in all", expected.int4 + expected.int8, kinds["DEQUANTIZE"]),
        ("plugins", 0, sum(count for kind, count in kinds.items() if kind.startswith("PLUGIN"))),
    ):
        if want != got:
            yield f"want {want} {what}, found {got}"


def _wrong_caches(layers: list[Any], expected: ExpectedLayers) -> Iterator[str]:
    """A cache update of other tensors than the network's own could not be carried out in place."""
    for layer in layers:
        if layer.type.name == "KV_CACHE_UPDATE":
            pair = (layer.get_input(0).name, layer.get_output(0).name)
            if pair not in expected.cache_updates:
                yield f"layer {layer.name!r} updates {pair[0]!r} to {pair[1]!r}, which is no cache of the contract"


def _wrong_masks(layers: list[Any], expected: ExpectedLayers) -> Iterator[str]:
    for layer in layers:
        if layer.type.name == "ATTENTION_INPUT":
            inputs = _inputs(layer)
            mask = inputs[_MASK] if len(inputs) > _MASK else None
            name = None if mask is None else mask.name
            if name != expected.mask:
                yield f"layer {layer.name!r} has the mask {name!r}, want {expected.mask!r}"


def _wrong_products(layers: list[Any], dtype: str) -> Iterator[str]:
    """A product in float32 inside a float16 graph costs twice the time and memory, or more."""
    for layer in layers:
        if layer.type.name in _PRODUCTS:
            kinds = {value.dtype.name for value in _inputs(layer)[:_OPERANDS] if value is not None}
            if kinds != {dtype}:
                yield f"layer {layer.name!r} ({layer.type.name}) takes {' and '.join(sorted(kinds))}, want {dtype}"

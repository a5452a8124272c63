"""A network that differs from what was written is refused, and the message names the difference."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt

from llava_deploy.engines.contract import Dim, GraphSpec, TensorSpec
from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.tensorrt.checks import ExpectedLayers, check_network, expected_decoder, with_sizes

HEADS, HEAD_DIM, SLOTS = 2, 16, 64
SIZE = HEADS * HEAD_DIM
CACHE = ("batch", HEADS, "max_len", HEAD_DIM)
NAMED = GraphSpec(
    "decoder",
    (
        TensorSpec("inputs_embeds", "float16", ("batch", "seq", SIZE)),
        TensorSpec("write_indices", "int64", ("batch",)),
        TensorSpec("attention_mask", "bool", ("batch", 1, "seq", "max_len")),
        TensorSpec("past.0.key", "float16", CACHE),
    ),
    (TensorSpec("logits", "float32", ("batch", "seq", SIZE)), TensorSpec("present.0.key", "float16", CACHE)),
    (Dim("batch", 1, 1, 4), Dim("seq", 1, 1, SLOTS), Dim("max_len", 1, SLOTS, SLOTS)),
)
SPEC = with_sizes(NAMED, {"max_len": SLOTS})
EXPECTED = ExpectedLayers(1, "attention_mask", (("past.0.key", "present.0.key"),), int4=1, int8=0)


@dataclass(frozen=True)
class Mistakes:
    """What the small decoder has wrong."""

    fused: bool = True
    masked: bool = True
    in_int4: bool = True
    in_halves: bool = True
    keeps_cache_name: bool = True
    stores: bool = True


class SmallDecoder:
    """A layer of attention with one cache for keys and values, after a quantised product."""

    def __init__(self, builder: Any, mistakes: Mistakes) -> None:
        self.network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._kept: list[np.ndarray] = []  # TensorRT keeps no copy of a constant
        self._mistakes = mistakes
        inputs = {tensor.name: self._input(tensor) for tensor in SPEC.inputs}
        x = self._projection(inputs["inputs_embeds"])
        split = self.network.add_shuffle(x)
        split.reshape_dims, split.second_transpose = (0, 0, HEADS, HEAD_DIM), (0, 2, 1, 3)
        q = split.get_output(0)
        present = self._cache(inputs, q)
        merge = self.network.add_shuffle(self._attention(q, present, inputs["attention_mask"]))
        merge.first_transpose, merge.reshape_dims = (0, 2, 1, 3), (0, 0, SIZE)
        logits = self.network.add_cast(merge.get_output(0), trt.DataType.FLOAT).get_output(0)
        logits.name = "logits"
        self.network.mark_output(logits)

    def _input(self, tensor: TensorSpec) -> Any:
        kinds = {"float16": trt.DataType.HALF, "int64": trt.DataType.INT64, "bool": trt.DataType.BOOL}
        shape = [-1 if isinstance(size, str) else size for size in tensor.shape]
        value = self.network.add_input(tensor.name, kinds[tensor.dtype], shape)
        for axis, size in enumerate(tensor.shape):
            if isinstance(size, str):
                value.set_dimension_name(axis, size)
        return value

    def _constant(self, shape: tuple[int, ...], kind: Any) -> Any:
        kinds = {trt.DataType.HALF: np.float16, trt.DataType.FLOAT: np.float32, trt.DataType.INT4: np.uint8}
        values = np.zeros(shape, kinds[kind])  # of INT4 twice the bytes that are read
        self._kept.append(values)
        return self.network.add_constant(shape, trt.Weights(kind, values.ctypes.data, values.size)).get_output(0)

    def _product(self, x: Any, weight: Any) -> Any:
        none = trt.MatrixOperation.NONE
        rows = self.network.add_shuffle(weight)
        rows.reshape_dims = (1, SIZE, SIZE)
        return self.network.add_matrix_multiply(x, none, rows.get_output(0), none).get_output(0)

    def _projection(self, x: Any) -> Any:
        half, single, square = trt.DataType.HALF, trt.DataType.FLOAT, (SIZE, SIZE)
        if self._mistakes.in_int4:
            values, scale = self._constant(square, trt.DataType.INT4), self._constant((1, SIZE), half)
            x = self._product(x, self.network.add_dequantize(values, scale, half).get_output(0))
        else:
            x = self._product(x, self._constant(square, half))
        if not self._mistakes.in_halves:
            wide = self.network.add_cast(x, single).get_output(0)
            x = self.network.add_cast(self._product(wide, self._constant(square, single)), half).get_output(0)
        return x

    def _cache(self, inputs: dict[str, Any], new: Any) -> Any:
        past = inputs["past.0.key"]
        if self._mistakes.stores:
            where = self.network.add_cast(inputs["write_indices"], trt.DataType.INT32).get_output(0)
            present = self.network.add_kv_cache_update(past, new, where, trt.KVCacheMode.LINEAR).get_output(0)
        else:
            present = self.network.add_identity(past).get_output(0)
        present.name = "present.0.key" if self._mistakes.keeps_cache_name else "cache"
        self.network.mark_output(present)
        return present

    def _attention(self, q: Any, present: Any, mask: Any) -> Any:
        if not self._mistakes.fused:
            turned, none = trt.MatrixOperation.TRANSPOSE, trt.MatrixOperation.NONE
            scores = self.network.add_matrix_multiply(q, none, present, turned).get_output(0)
            return self.network.add_matrix_multiply(scores, none, present, none).get_output(0)
        attention = self.network.add_attention(q, present, present, trt.AttentionNormalizationOp.SOFTMAX, False)
        if self._mistakes.masked:
            attention.mask = mask
        return attention.get_output(0)


@pytest.fixture
def decoder() -> Iterator[Callable[[Mistakes], Any]]:
    """Make the small decoder; builders and constants live as long as the test."""
    builder, kept = trt.Builder(trt.Logger(trt.Logger.ERROR)), []

    def make(mistakes: Mistakes) -> Any:
        kept.append(SmallDecoder(builder, mistakes))
        return kept[-1].network

    yield make
    kept.clear()


def refusal(network: Any, spec: GraphSpec = SPEC, expected: ExpectedLayers = EXPECTED) -> str:
    with pytest.raises(BackendError) as caught:
        check_network(trt, network, spec, expected)
    return str(caught.value)


def test_the_network_that_was_asked_for(decoder: Callable[..., Any]) -> None:
    check_network(trt, decoder(Mistakes()), SPEC, EXPECTED)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"fused": False}, ["want 1 ATTENTION_INPUT layers, found 0", "input 'attention_mask' is used by no layer"]),
        ({"masked": False}, ["has the mask None, want 'attention_mask'", "'attention_mask' is used by no layer"]),
        ({"in_int4": False}, ["want 1 weights through DEQUANTIZE of INT4, found 0"]),
        ({"in_halves": False}, ["(MATRIX_MULTIPLY) takes FLOAT, want HALF"]),
        (
            {"keeps_cache_name": False},
            ["'past.0.key' to 'cache'", "output 'present.0.key' is missing", "'cache' is not"],
        ),
        ({"stores": False}, ["want 1 KV_CACHE_UPDATE layers, found 0"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said(decoder: Callable[..., Any], mistake: dict[str, bool], said: list[str]) -> None:
    message = refusal(decoder(dataclasses.replace(Mistakes(), **mistake)))
    assert message.startswith(f"graph 'decoder': TensorRT {trt.__version__} has read another network than was written")
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("index", "other", "said"),
    [
        (0, TensorSpec("inputs_embeds", "float32", ("batch", "seq", SIZE)), f"is HALF['batch', 'seq', {SIZE}], want f"),
        (0, TensorSpec("inputs_embeds", "float16", ("batch", "tokens", SIZE)), "want float16['batch', 'tokens', 32]"),
        (1, TensorSpec("write_indices", "int64", (4,)), "is INT64['batch'], want int64[4]"),
        (
            3,
            TensorSpec("past.0.key", "float16", CACHE),
            f"is HALF['batch', 2, {SLOTS}, 16], want float16['batch', 2, 'm",
        ),
        (2, TensorSpec("mask", "bool", ("batch", 1, "seq", SLOTS)), "input 'attention_mask' is not in the contract"),
    ],
)
def test_bindings_of_another_contract(decoder: Callable[..., Any], index: int, other: TensorSpec, said: str) -> None:
    inputs = [*SPEC.inputs]
    inputs[index] = other
    assert said in refusal(decoder(Mistakes()), dataclasses.replace(SPEC, inputs=tuple(inputs)))


def test_outputs_of_another_contract(decoder: Callable[..., Any]) -> None:
    narrow = TensorSpec("logits", "float32", ("batch", "seq", 8))
    message = refusal(decoder(Mistakes()), dataclasses.replace(SPEC, outputs=(narrow, SPEC.outputs[1])))
    assert f"output 'logits' is FLOAT[-1, -1, {SIZE}], want float32['batch', 'seq', 8]" in message


def test_other_layers_than_expected(decoder: Callable[..., Any]) -> None:
    network = decoder(Mistakes())
    message = refusal(network, expected=dataclasses.replace(EXPECTED, attentions=2, int4=0, int8=1, cache_updates=()))
    assert "want 2 ATTENTION_INPUT layers, found 1" in message
    assert "want 1 weights through DEQUANTIZE of INT8, found 0" in message
    assert "updates 'past.0.key' to 'present.0.key', which is no cache of the contract" in message


def test_a_message_stays_short(decoder: Callable[..., Any]) -> None:
    message = refusal(decoder(Mistakes()), dataclasses.replace(SPEC, inputs=SPEC.inputs[:1], outputs=()))
    assert message.count("is not in the contract") == 5
    assert message.endswith("not in the contract; build with another version of TensorRT, or with ONNX Runtime")
    nothing = ExpectedLayers(0, None, (), 0, 0)
    message = refusal(decoder(Mistakes()), dataclasses.replace(SPEC, inputs=SPEC.inputs[:1], outputs=()), nothing)
    assert "; and 6 more; build with another version" in message


def test_a_plugin(decoder: Callable[..., Any]) -> None:
    class Layer:
        """A layer whose kind is a plugin's; the others answer as TensorRT's do."""

        def __init__(self, layer: Any) -> None:
            self._layer, self.type = layer, trt.LayerType.PLUGIN_V3

        def __getattr__(self, name: str) -> Any:
            return getattr(self._layer, name)

    class Network:
        def __init__(self, network: Any) -> None:
            self._network = network

        def __getattr__(self, name: str) -> Any:
            return getattr(self._network, name)

        def get_layer(self, index: int) -> Any:
            layer = self._network.get_layer(index)
            return Layer(layer) if layer.type == trt.LayerType.SHUFFLE else layer

    assert "want 0 plugins, found 3" in refusal(Network(decoder(Mistakes())))


def test_a_part_of_a_decoder_has_its_own_layers() -> None:
    expected = expected_decoder(range(4, 8), Counter({4: 28, 8: 1}), "in-place")
    assert (expected.attentions, expected.mask, expected.int4, expected.int8) == (4, "attention_mask", 28, 1)
    names = [name for pair in expected.cache_updates for name in pair]
    assert sorted(names) == sorted(
        f"{kind}.{layer}.{part}" for kind in ("past", "present") for layer in range(4, 8) for part in ("key", "value")
    )
    assert expected_decoder(range(2), Counter(), "growing") == ExpectedLayers(0, None, (), 0, 0)

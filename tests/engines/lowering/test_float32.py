"""Floats widened: what float16 graphs say without their rounding, and an interface that stays but for the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.float32 import WidenFloats
from llava_deploy.engines.lowering.nibbles import byte_chunks
from llava_deploy.exporter.config import DecoderConfig, RopeConfig

PLAIN = RopeConfig("default", 10_000.0, None, None, None, None)
BASE = DecoderConfig("llama", 32, 48, 1, 2, 1, 16, 40, 64, "silu", 1e-5, PLAIN, False, False, False)


def test_the_interface_stays_but_for_the_cache(draw_graphs: Callable[..., Any]) -> None:
    graphs = draw_graphs(BASE, "fp16")
    for model, spec in ((graphs.vision, graphs.vision_shape.spec()), (graphs.decoder, graphs.decoder_shape.spec())):
        assert WidenFloats()(model).modified
        ends = [*model.graph.inputs, *model.graph.outputs]
        for value, tensor in zip(ends, [*spec.inputs, *spec.outputs], strict=True):
            is_cache = tensor.name.startswith(("past.", "present."))
            want = np.float32 if is_cache else tensor.dtype
            assert (value.name, value.dtype) == (tensor.name, ir.DataType.from_numpy(np.dtype(want)))
        inner = {value.dtype for node in list(model.graph)[1:-1] for value in node.outputs}
        assert ir.DataType.FLOAT16 not in inner | {value.dtype for value in model.graph.initializers.values()}
        assert not WidenFloats()(model).modified


def test_constants_are_widened_to_the_bit(draw_graphs: Callable[..., Any]) -> None:
    model = draw_graphs(BASE, "fp16").decoder
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    WidenFloats()(model)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        want = np.asarray(before[name].numpy())
        want = want.astype(np.float32) if want.dtype == np.float16 else want
        np.testing.assert_array_equal(value.const_value.numpy(), want)
        assert b"".join(chunk.tobytes() for chunk in byte_chunks(value.const_value)) == want.tobytes()


def test_a_float32_graph_is_left_as_it_is(draw_graphs: Callable[..., Any]) -> None:
    graphs = draw_graphs(BASE, "fp32")
    for model in (graphs.vision, graphs.decoder):
        before = ir.to_proto(model).SerializeToString()
        assert not WidenFloats()(model).modified
        assert ir.to_proto(model).SerializeToString() == before


def cast_like(graph: ir.Graph) -> ir.Node:
    constant = ir.tensor(np.zeros(1, np.float16))
    return ir.node("ConstantOfShape", [graph.inputs[0]], {"value": constant}, name="typed")


def branch(graph: ir.Graph) -> ir.Node:
    return ir.node("If", [graph.inputs[0]], {"then_branch": ir.Graph([], [], nodes=[])}, name="typed")


@pytest.mark.parametrize(
    ("make", "message"),
    [(cast_like, "want no ConstantOfShape that names a type"), (branch, "If has a subgraph: widen it before")],
)
def test_what_names_a_type_is_refused(
    draw_graphs: Callable[..., Any], make: Callable[[ir.Graph], ir.Node], message: str
) -> None:
    model = draw_graphs(BASE, "fp16").vision
    model.graph.append(make(model.graph))
    with pytest.raises(ir.passes.PreconditionError, match=f"node 'typed': .*{message}|node 'typed': {message}"):
        WidenFloats()(model)

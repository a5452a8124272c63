"""The cache by concatenation: what is left of the graph, and what the rule does not cover by name.

That its numbers are the canonical graph's is tested with whole decoders, in test_tensorrt.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.growing_cache import GrowCache
from llava_deploy.exporter.config import DecoderConfig, RopeConfig

PLAIN = RopeConfig("default", 10_000.0, None, None, None, None)
SMALL = DecoderConfig("llama", 32, 48, 2, 4, 2, 8, 20, 64, "silu", 1e-5, PLAIN, False, False, False)


def test_scatters_and_slices_become_one_concatenation_each(draw_graphs: Any) -> None:
    graphs = draw_graphs(SMALL, "fp32")
    model = graphs.decoder
    before = Counter(node.op_type for node in model.graph)
    assert GrowCache()(model).modified
    after = Counter(node.op_type for node in model.graph)
    gone = {"TensorScatter": 4, "Slice": 4, "Shape": 1}
    assert before - after == gone
    assert after - before == {"Concat": 4}
    spec = graphs.decoder_shape.growing_spec()
    assert [value.name for value in model.graph.inputs] == [tensor.name for tensor in spec.inputs]
    assert [str(value.shape) for value in model.graph.outputs] == [
        f"[{','.join(map(str, tensor.shape))}]" for tensor in spec.outputs
    ]
    for node in model.graph:
        if node.op_type == "Attention":
            assert [value.name for value in node.inputs[1:3] if value is not None] in (
                ["present.0.key", "present.0.value"],
                ["present.1.key", "present.1.value"],
            )
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    with pytest.raises(ir.passes.PreconditionError, match="want a decoder with inputs write_indices"):
        GrowCache()(model)


def scatter(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "TensorScatter")


def circular(model: ir.Model) -> None:
    scatter(model).attributes["mode"] = ir.AttrString("mode", "circular")


def seen_whole(model: ir.Model) -> None:
    present = scatter(model).outputs[0]
    model.graph.insert_after(scatter(model), ir.node("Identity", inputs=[present]))


def past_looked_at(model: ir.Model) -> None:
    model.graph.insert_before(scatter(model), ir.node("Identity", inputs=[scatter(model).inputs[0]]))


def written_elsewhere(model: ir.Model) -> None:
    write = scatter(model).inputs[2]
    double = ir.node("Add", inputs=[write, write])
    double.outputs[0].name = "double"
    model.graph.insert_before(scatter(model), double)
    scatter(model).replace_input_with(2, double.outputs[0])


def sliced_from_one(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Slice":
            assert node.inputs[3] is not None
            node.replace_input_with(1, node.inputs[3])


def sliced_by_another_length(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "Shape":
            node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", 2), ir.AttrInt64("end", 3)


def no_writes(model: ir.Model) -> None:
    next(value for value in model.graph.inputs if value.name == "write_indices").name = "writes"


FIRST = r"'.*TensorScatter_node_\d+': a cache that cannot be made to grow: "


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (circular, f"{FIRST}want axis -2, linear"),
        (seen_whole, f"{FIRST}want it used by slices of as many slots as attention_mask covers, got Identity"),
        (past_looked_at, rf"{FIRST}want an input past\.\* that nothing else uses, got 'past\.0\.key'"),
        (written_elsewhere, f"{FIRST}want write_indices to say where, and an output of the graph, got 'double'"),
        (sliced_from_one, f"{FIRST}want it used by slices .* got Slice"),
        (sliced_by_another_length, f"{FIRST}want it used by slices .* got Slice"),
        (no_writes, "want a decoder with inputs write_indices and attention_mask, found"),
    ],
)
def test_another_form_is_refused_by_name(draw_graphs: Any, change: Callable[[ir.Model], None], problem: str) -> None:
    model = draw_graphs(SMALL, "fp32").decoder
    change(model)
    with pytest.raises(ir.passes.PreconditionError, match=problem):
        GrowCache()(model)

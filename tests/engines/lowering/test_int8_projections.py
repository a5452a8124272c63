"""Queries, keys and values as one product in integers: the very same numbers, and what is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.float32 import WidenFloats
from llava_deploy.engines.lowering.group_query_attention import Form, LowerGroupQueryAttention
from llava_deploy.engines.lowering.int8_linears import RoundLinearsToInt8
from llava_deploy.engines.lowering.int8_projections import PackInt8Projections
from llava_deploy.engines.processor import has_int8_products
from llava_deploy.exporter.config import DecoderConfig, RopeConfig
from llava_deploy.exporter.quantization.weight import WeightFormat

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="no exact products of 8-bit integers here")

SLOTS = 24
BASE = DecoderConfig(
    "llama", 64, 96, 2, 4, 2, 16, 50, 128, "silu", 1e-5,
    RopeConfig("default", 10_000.0, None, None, None, None), False, False, False,
)  # fmt: skip
INT4 = WeightFormat(4, 32, False, False)


def rounded(model: ir.Model, form: Form = Form.ALONE) -> ir.Model:
    for each in (WidenFloats(), RoundLinearsToInt8(), LowerGroupQueryAttention(form)):
        each(model)
    return model


def prompt(model: ir.Model, batch: int, seq: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seq)
    feed = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        sizes = {"batch": batch, "seq": seq}
        shape = [s if isinstance(s, int) else sizes.get(str(s.value), SLOTS) for s in value.shape]
        feed[str(value.name)] = np.zeros(shape, value.dtype.numpy())
    feed["inputs_embeds"] = rng.standard_normal(feed["inputs_embeds"].shape).astype(feed["inputs_embeds"].dtype)
    feed["position_ids"] = np.broadcast_to(np.arange(seq), (batch, seq)).copy()
    mask = np.arange(SLOTS) <= np.arange(seq)[:, None]
    feed["attention_mask"] = np.broadcast_to(mask, (batch, 1, seq, SLOTS)).copy()
    feed["last_index"] = np.full(batch, seq - 1)
    return feed


@pytest.mark.parametrize(("precision", "weight"), [("fp32", None), ("int4", INT4)])
@pytest.mark.parametrize(("batch", "seq"), [(1, 7), (3, 1), (2, 5)])
def test_every_number_is_the_same(
    draw_graphs: Callable[..., Any], run_model: Callable[..., Any], precision: str, weight: Any, batch: int, seq: int
) -> None:
    model = rounded(draw_graphs(BASE, precision, 3, weight, weight).decoder)
    feed = prompt(model, batch, seq)
    want = run_model(model, feed)
    before = Counter(node.op_type for node in model.graph)
    assert PackInt8Projections()(model).modified
    after = Counter(node.op_type for node in model.graph)
    assert [before[kind] - after[kind] for kind in ("MatMulIntegerToFloat", "Mul")] == [2 * BASE.num_hidden_layers] * 2
    weights = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    assert [value.name for value in weights if not value.uses()] == []
    found = run_model(ir.from_proto(ir.to_proto(model)), feed)
    assert found.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(found[name], want[name], name)
    assert not PackInt8Projections()(model).modified


def test_parts_with_biases_stay_apart(draw_graphs: Callable[..., Any]) -> None:
    model = rounded(draw_graphs(replace(BASE, attention_bias=True), "fp32").decoder)
    assert not PackInt8Projections()(model).modified


def test_branches_stay_as_they_are(draw_graphs: Callable[..., Any]) -> None:
    model = rounded(draw_graphs(BASE, "fp32").decoder, Form.BRANCH)
    assert not PackInt8Projections()(model).modified


@pytest.mark.parametrize("index", range(3))
def test_a_part_that_others_use_stays(draw_graphs: Callable[..., Any], index: int) -> None:
    model = rounded(draw_graphs(BASE, "fp32").decoder)
    first = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    part = first.inputs[index]
    assert part is not None
    model.graph.outputs.append(part)
    assert PackInt8Projections()(model).modified  # the other layer
    assert first.inputs[index] is part

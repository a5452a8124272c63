"""Attention with a sink that takes nothing: the same numbers, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.contract import DecoderShape
from llava_deploy.engines.lowering.group_query_attention import Form
from llava_deploy.engines.lowering.onnxruntime import decoder_passes
from llava_deploy.engines.lowering.whole_scores import AttendWithoutTiles
from llava_deploy.exporter.config import DecoderConfig, RopeConfig
from llava_deploy.runtime.onnxruntime_backend import OnnxRuntimeDecoder, OnnxRuntimeOptions

SLOTS = 320
ROPE = RopeConfig("default", 10_000.0, None, None, None, None)
BASE = DecoderConfig("llama", 64, 96, 2, 8, 1, 16, 50, 512, "silu", 1e-5, ROPE, False, False, False)


@pytest.fixture(scope="module")
def decoder(draw_graphs: Callable[..., Any]) -> Any:
    return draw_graphs(BASE, "fp32", 5)


def lowered(model: ir.Model, form: Form, *int8: Any) -> ir.Model:
    copy = ir.from_proto(ir.to_proto(model))
    for each in decoder_passes(form, int8):
        each(copy)
    return ir.from_proto(ir.to_proto(copy))


def session(model: ir.Model, shape: DecoderShape, path: Path) -> OnnxRuntimeDecoder:
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return OnnxRuntimeDecoder(path, shape, SLOTS, OnnxRuntimeOptions(threads=1, accuracy_level=None))


@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_goes_into_the_sink(decoder: Any, tmp_path: Path, rows: int) -> None:
    shape, rng = decoder.decoder_shape, np.random.default_rng(rows)
    graphs = [lowered(decoder.decoder, Form.ALONE), lowered(decoder.decoder, Form.ALONE, "prefill")]
    sessions = [session(graph, shape, tmp_path / f"{i}.onnx") for i, graph in enumerate(graphs)]
    for each in sessions:
        each.begin(rows)
    at = np.zeros(rows, np.int64)
    for seq in (1, 7, 250, 1, 3, 1):
        embeds = rng.standard_normal((rows, seq, shape.hidden_size)).astype(np.float32)
        last = rng.integers(0, seq, rows)
        want, found = (each.step(embeds, at, last).copy() for each in sessions)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))
        at = at + seq


def sinks(model: ir.Model) -> list[str | None]:
    nodes = (node for node in ir.traversal.RecursiveGraphIterator(model.graph))
    found = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert found
    return [None if len(node.inputs) <= 11 or node.inputs[11] is None else node.inputs[11].name for node in found]


def test_only_a_decoder_of_short_steps_has_it_and_once(decoder: Any) -> None:
    assert set(sinks(lowered(decoder.decoder, Form.ALONE))) == {None}
    assert set(sinks(lowered(decoder.decoder, Form.ALONE, "vision"))) == {None}
    model = lowered(decoder.decoder, Form.ALONE, "vision", "prefill")
    assert set(sinks(model)) == {"lowering.no_sink_8"}
    assert not AttendWithoutTiles()(model).modified


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (9, 3), (4, 4)])
def test_where_few_heads_share_keys_tiles_stay(draw_graphs: Callable[..., Any], heads: int, kv_heads: int) -> None:
    drawn = draw_graphs(replace(BASE, num_attention_heads=heads, num_key_value_heads=kv_heads), "fp32", 5)
    assert set(sinks(lowered(drawn.decoder, Form.ALONE, "prefill"))) == {None}


def test_older_releases_attention_is_left_as_it_is(decoder: Any) -> None:
    assert set(sinks(lowered(decoder.decoder, Form.BRANCH, "prefill"))) == {None}

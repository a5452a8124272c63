"""A cache of static length: shapes alone are changed, and only a decoder's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.static_cache import FixCacheLength
from llava_deploy.exporter.config import DecoderConfig, RopeConfig

PLAIN = RopeConfig("default", 10_000.0, None, None, None, None)
SMALL = DecoderConfig("llama", 32, 48, 2, 4, 2, 8, 20, 64, "silu", 1e-5, PLAIN, False, False, False)


def without_shapes(model: ir.Model) -> list[Any]:
    return [(node.op_type, [v and v.name for v in node.inputs], [v.name for v in node.outputs]) for node in model.graph]


def test_every_length_is_a_number_and_nothing_else_changes(draw_graphs: Any) -> None:
    model = draw_graphs(SMALL, "fp16").decoder
    before = without_shapes(model)
    other = [value for value in model.graph.inputs if not str(value.name).startswith("past.")]
    shapes = [str(value.shape) for value in other]
    assert FixCacheLength(48)(model).modified
    assert without_shapes(model) == before
    assert [str(value.shape) for value in other] == shapes
    caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if str(v.name).startswith(("past.", "present."))]
    assert len(caches) == 8
    assert {str(value.shape) for value in caches} == {"[batch,2,48,8]"}
    assert "max_len" not in str(ir.to_proto(model))
    assert not FixCacheLength(48)(model).modified


def no_cache(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = str(value.name).replace("past", "before").replace("present", "after")


def another_length(model: ir.Model) -> None:
    FixCacheLength(32)(model)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (no_cache, "want a decoder with a cache, found no input past"),
        (another_length, r"cache 'past\.0\.key': want length max_len, found 32"),
    ],
)
def test_another_graph_is_refused(draw_graphs: Any, change: Callable[[ir.Model], None], problem: str) -> None:
    model = draw_graphs(SMALL, "fp32").decoder
    change(model)
    with pytest.raises(ir.passes.PreconditionError, match=problem):
        FixCacheLength(48)(model)

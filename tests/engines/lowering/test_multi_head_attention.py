"""A tower's attention in one operator: the same features, and what is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llava_deploy.engines.lowering.float32 import WidenFloats
from llava_deploy.engines.lowering.int8_linears import RoundLinearsToInt8
from llava_deploy.engines.lowering.multi_head_attention import LowerMultiHeadAttention
from llava_deploy.engines.processor import has_int8_products
from llava_deploy.exporter.config import DecoderConfig, RopeConfig, VisionConfig

DECODER = DecoderConfig(
    "llama", 64, 96, 1, 4, 2, 16, 50, 128, "silu", 1e-5,
    RopeConfig("default", 10_000.0, None, None, None, None), False, False, False,
)  # fmt: skip
TOWERS = {
    "two heads of 8": VisionConfig("clip_vision_model", 16, 24, 2, 2, 16, 8, 3, "gelu", 1e-5),
    "three heads of 8, odd sizes": VisionConfig("clip_vision_model", 24, 40, 3, 3, 28, 9, 3, "quick_gelu", 1e-5),
    "one head": VisionConfig("clip_vision_model", 16, 24, 1, 1, 16, 8, 3, "gelu", 1e-5),
}


def pixels(model: ir.Model, images: int, seed: int) -> dict[str, np.ndarray]:
    (value,) = model.graph.inputs
    assert value.shape is not None
    assert value.dtype is not None
    rng = np.random.default_rng(seed)
    return {str(value.name): rng.standard_normal((images, *value.shape[1:])).astype(value.dtype.numpy())}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_features_are_the_same(
    draw_graphs: Callable[..., Any], run_model: Callable[..., Any], precision: str, tower: str, images: int
) -> None:
    config = TOWERS[tower]
    model = draw_graphs(DECODER, precision, 1, vision=config).vision
    WidenFloats()(model)
    feed = pixels(model, images, 2)
    (want,) = run_model(model, feed).values()
    before = Counter(node.op_type for node in model.graph)
    assert LowerMultiHeadAttention()(model).modified
    after = Counter(node.op_type for node in model.graph)
    layers = before["Attention"]
    assert layers > 0
    assert (after["MultiHeadAttention"], after["Attention"]) == (layers, 0)
    assert [before[kind] - after[kind] for kind in ("Transpose", "Reshape", "Add")] == [
        4 * layers,
        4 * layers,
        3 * layers,
    ]
    model = ir.from_proto(ir.to_proto(model))  # as it is written: every value is named, and in order
    (found,) = run_model(model, feed).values()
    np.testing.assert_allclose(
        found, want, rtol=0, atol=1e-5 * float(np.abs(want).max()) if precision == "fp32" else 1e-2
    )
    assert not LowerMultiHeadAttention()(model).modified


def test_an_error_would_be_seen(draw_graphs: Callable[..., Any], run_model: Callable[..., Any]) -> None:
    model = draw_graphs(DECODER, "fp32", 1).vision
    feed = pixels(model, 1, 2)
    (want,) = run_model(model, feed).values()
    LowerMultiHeadAttention()(model)
    (first, *_) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    first.replace_input_with(3, None)  # its biases
    (found,) = run_model(model, feed).values()
    assert np.abs(found - want).max() > 1e-3 * np.abs(want).max()


@pytest.mark.skipif(not has_int8_products(), reason="no exact products of 8-bit integers here")
def test_behind_products_in_integers(draw_graphs: Callable[..., Any], run_model: Callable[..., Any]) -> None:
    model = draw_graphs(DECODER, "fp32", 4, vision=TOWERS["two heads of 8"]).vision
    RoundLinearsToInt8()(model)
    feed = pixels(model, 2, 5)
    (want,) = run_model(model, feed).values()
    assert LowerMultiHeadAttention()(model).modified
    assert not {"Attention"} & {node.op_type for node in model.graph}
    (found,) = run_model(model, feed).values()
    np.testing.assert_allclose(
        found, want, atol=0.05 * want.std()
    )  # where a value rounds otherwise, a step of some 1 %


def test_values_that_others_use_stay(draw_graphs: Callable[..., Any], run_model: Callable[..., Any]) -> None:
    model = draw_graphs(DECODER, "fp32", 1).vision
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    kept = attentions[0].inputs[0]
    assert kept is not None
    model.graph.outputs.append(kept)
    assert LowerMultiHeadAttention()(model).modified == (len(attentions) > 1)
    assert attentions[0] in list(model.graph)


@pytest.mark.parametrize("index", range(3))
def test_a_bias_that_others_read_is_added_as_before(
    draw_graphs: Callable[..., Any], run_model: Callable[..., Any], index: int
) -> None:
    """Sums that are results too are made as they were; the operator takes them."""
    model = draw_graphs(DECODER, "fp32", 1).vision
    feed = pixels(model, 2, 2)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    turned = attention.inputs[index]
    assert turned is not None
    total = turned.producer().inputs[0].producer().inputs[0]  # type: ignore[union-attr]
    assert total is not None
    model.graph.outputs.append(total)
    want = [*run_model(model, feed).values()]
    assert LowerMultiHeadAttention()(model).modified
    found = [*run_model(model, feed).values()]
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(np.abs(other).max()))


def test_a_decoder_is_left_as_it_is(draw_graphs: Callable[..., Any]) -> None:
    model = draw_graphs(DECODER, "fp32", 1).decoder
    before = Counter(node.op_type for node in model.graph)
    assert before["Attention"] > 0
    assert not LowerMultiHeadAttention()(model).modified
    assert Counter(node.op_type for node in model.graph) == before

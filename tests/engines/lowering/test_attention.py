"""Attention in elementary operators: the same numbers, keys never repeated, other forms refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from llava_deploy.engines.lowering.attention import LowerAttention

KINDS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_heads: int
    head_dim: int
    masked: bool


def attentions(sizes: Sizes, dtype: Any, **attributes: Any) -> ir.Model:
    """Two layers: ``y = attention(q, k, v)``, ``z = attention(y, k, v)``, both with the same mask."""
    masks = ["mask"] if sizes.masked else []
    nodes = [
        helper.make_node("Attention", [q, "k", "v", *masks], [out], name=f"look {out}", **attributes)
        for q, out in (("q", "y"), ("y", "z"))
    ]
    rows = ["batch", sizes.heads, "seq", sizes.head_dim]
    slots = ["batch", sizes.kv_heads, "total", sizes.head_dim]
    inputs = [helper.make_tensor_value_info(name, KINDS[dtype], rows if name == "q" else slots) for name in "qkv"]
    inputs += [helper.make_tensor_value_info("mask", TensorProto.BOOL, ["batch", 1, "seq", "total"])] if masks else []
    outputs = [helper.make_tensor_value_info(name, KINDS[dtype], rows) for name in "yz"]
    graph = helper.make_graph(nodes, "attentions", inputs, outputs)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11))


def draw(sizes: Sizes, dtype: Any, batch: int, seq: int, total: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    feed = {"q": rng.standard_normal((batch, sizes.heads, seq, sizes.head_dim)) * 2}
    feed |= {name: rng.standard_normal((batch, sizes.kv_heads, total, sizes.head_dim)) * 2 for name in "kv"}
    feed = {name: array.astype(dtype) for name, array in feed.items()}
    if sizes.masked:
        feed["mask"] = rng.random((batch, 1, seq, total)) < rng.choice([0.1, 0.5, 0.9])
        feed["mask"][..., rng.integers(total)] = True
    return feed


def reference(feed: dict[str, np.ndarray], sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Attended values in float64, and how far each moves, of 1, when scores do by a unit: ``[batch, heads, seq]``."""
    q, k, v = (feed[name].astype(np.float64) for name in "qkv")
    k, v = (np.repeat(each, sizes.heads // sizes.kv_heads, axis=1) for each in (k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(sizes.head_dim)
    terms = np.abs(q) @ np.abs(k).swapaxes(-1, -2) / np.sqrt(sizes.head_dim)
    if sizes.masked:
        scores = np.where(feed["mask"], scores, -np.inf)
        terms = np.where(feed["mask"], terms, 0)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    largest = np.abs(v).max(axis=-2, keepdims=True)  # [batch, heads, 1, head_dim]
    return weights @ v, largest * terms.max(axis=-1, keepdims=True)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.integers(1, 40),
    masked=st.booleans(),
    batch=st.integers(1, 3),
    seq=st.integers(1, 5),
    total=st.integers(1, 20),
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 2**32),
)
def test_numbers_are_the_operators(
    run_model: Any, kv_heads: int, group: int, head_dim: int, masked: bool, batch: int, seq: int, total: int,
    dtype: Any, seed: int,
) -> None:  # fmt: skip
    sizes = Sizes(kv_heads * group, kv_heads, head_dim, masked)
    feed = draw(sizes, dtype, batch, seq, total, np.random.default_rng(seed))
    model = attentions(sizes, dtype)
    want = run_model(model, feed)
    assert LowerAttention()(model).modified
    found = run_model(model, feed)
    exact, per_unit = reference(feed, sizes)
    # A score is off by its queries', its sum's and its own rounding, probabilities by twice that and their own; then
    # a sum and the result. Float32 adds its sums' errors.
    unit = 2.0**-11 if dtype == np.float16 else (head_dim + total) * 2.0**-24
    bound = unit * (2 * 3 * per_unit + 3 * np.abs(feed["v"]).astype(np.float64).max())
    assert (np.abs(found["y"] - exact) <= bound).all()
    assert (np.abs(found["y"].astype(np.float64) - want["y"].astype(np.float64)) <= 2 * bound).all()
    if dtype == np.float32:
        np.testing.assert_allclose(found["z"], want["z"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_large_scores_do_not_overflow(run_model: Any, dtype: Any) -> None:
    sizes = Sizes(4, 2, 64, True)
    feed = draw(sizes, dtype, 2, 3, 9, np.random.default_rng(0))
    feed["q"] *= 10
    feed["k"] *= 10  # a product of 64 of them is up to some 50,000 before it is scaled
    model = attentions(sizes, dtype)
    LowerAttention()(model)
    found = run_model(model, feed)["y"].astype(np.float64)
    assert np.isfinite(found).all()
    assert (np.abs(found) <= np.abs(feed["v"]).max() * 1.001).all()


def test_a_row_that_sees_nothing_is_no_nan(run_model: Any) -> None:
    sizes = Sizes(2, 1, 8, True)
    feed = draw(sizes, np.float32, 2, 2, 5, np.random.default_rng(0))
    feed["mask"][1, 0, 1] = False
    model = attentions(sizes, np.float32)
    LowerAttention()(model)
    found = run_model(model, feed)["y"]
    np.testing.assert_allclose(found[1, :, 1], np.repeat(feed["v"][1].mean(axis=1), 2, axis=0), rtol=1e-5)


def test_keys_are_not_repeated_and_the_mask_is_turned_once(run_model: Any) -> None:
    sizes = Sizes(8, 2, 16, True)
    model = attentions(sizes, np.float32)
    LowerAttention()(model)
    found = Counter(node.op_type for node in model.graph)
    assert found["Where"] == 1
    assert found["Concat"] == 1  # the mask's rows, for a group's heads
    assert found["Reshape"] == 4  # queries and results of two layers: nothing between the products
    assert not {"Expand", "Tile", "Gather"} & {*found}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not LowerAttention()(model).modified
    ungrouped = attentions(Sizes(8, 8, 16, True), np.float32)
    LowerAttention()(ungrouped)
    assert not {"Reshape", "Concat"} & {node.op_type for node in ungrouped.graph}


def test_a_scale_is_taken(run_model: Any) -> None:
    sizes = Sizes(4, 2, 8, False)
    feed = draw(sizes, np.float32, 1, 3, 6, np.random.default_rng(0))
    model = attentions(sizes, np.float32, scale=0.125)
    want = run_model(model, feed)["z"]
    LowerAttention()(model)
    np.testing.assert_allclose(run_model(model, feed)["z"], want, rtol=1e-5, atol=1e-6)


def causal(node: ir.Node) -> None:
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def capped(node: ir.Node) -> None:
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 20.0)


def float_mask(node: ir.Node) -> None:
    assert node.inputs[3] is not None
    node.inputs[3].dtype = ir.DataType.FLOAT


def odd_heads(node: ir.Node) -> None:
    assert node.inputs[1] is not None
    node.inputs[1].shape = ir.Shape(["batch", 3, "total", 8])


def heads_that_do_not_divide(node: ir.Node) -> None:
    for value in node.inputs[1:3]:
        assert value is not None
        value.shape = ir.Shape(["batch", 3, "total", 8])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (heads_that_do_not_divide, "want keys and values of as many heads, which divide 4, got 3 and 3"),
        (causal, "it has an attribute is_causal"),
        (capped, "it has an attribute softcap"),
        (float_mask, "want a mask of bools"),
        (odd_heads, "want keys and values of as many heads, which divide 4, got 3 and 2"),
    ],
)
def test_another_form_is_refused_by_name(change: Callable[[ir.Node], None], problem: str) -> None:
    model = attentions(Sizes(4, 2, 8, True), np.float32)
    change(model.graph[0])
    with pytest.raises(ir.passes.PreconditionError, match=f"'look y': Attention cannot be lowered: {problem}"):
        LowerAttention()(model)

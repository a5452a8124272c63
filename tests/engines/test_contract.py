from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_deploy.engines.contract import (
    DecoderShape,
    Dim,
    GraphSpec,
    TensorSpec,
    VisionShape,
    hidden_state_name,
    past_name,
    present_name,
)
from llava_deploy.engines.errors import ContractError

VISION = VisionShape("float32", image_height=28, image_width=42, patches=6, hidden_size=8)
DECODER = DecoderShape("float16", 8, layers=2, kv_heads=1, head_dim=4, vocab_size=11, max_positions=32)


def decoder_feed(batch: int, seq: int, total: int, max_len: int) -> dict[str, np.ndarray]:
    feed = {
        "inputs_embeds": np.zeros((batch, seq, 8), np.float16),
        "position_ids": np.zeros((batch, seq), np.int64),
        "write_indices": np.zeros(batch, np.int64),
        "attention_mask": np.ones((batch, 1, seq, total), bool),
        "last_index": np.zeros(batch, np.int64),
    }
    names = [past_name(layer, part) for layer in range(2) for part in ("key", "value")]
    return feed | {name: np.zeros((batch, 1, max_len, 4), np.float16) for name in names}


def error_of(spec: GraphSpec, feed: dict[str, np.ndarray]) -> str:
    with pytest.raises(ContractError) as raised:
        spec.check(feed)
    return str(raised.value)


def test_the_vision_contract() -> None:
    spec = VISION.spec(max_images=5)
    assert [f"{s.name} {s}" for s in (*spec.inputs, *spec.outputs)] == [
        "pixel_values float32['images', 3, 28, 42]",
        "image_features float32['images', 6, 8]",
    ]
    assert spec.check({"pixel_values": np.zeros((5, 3, 28, 42), np.float32)}) == {"images": 5}


def test_the_decoder_contract() -> None:
    spec = DECODER.spec()
    cache = "float16['batch', 1, 'max_len', 4]"
    assert {s.name: str(s) for s in spec.inputs} == {
        "inputs_embeds": "float16['batch', 'seq', 8]",
        "position_ids": "int64['batch', 'seq']",
        "write_indices": "int64['batch']",
        "attention_mask": "bool['batch', 1, 'seq', 'total']",
        "last_index": "int64['batch']",
        **{f"past.{i}.{part}": cache for i in (0, 1) for part in ("key", "value")},
    }
    assert {s.name: str(s) for s in spec.outputs} == {
        "logits": "float32['batch', 11]",  # always float32, whatever the graph computes in
        **{f"present.{i}.{part}": cache for i in (0, 1) for part in ("key", "value")},
    }


def test_names_are_stated_once() -> None:
    assert (past_name(3, "key"), present_name(3, "value")) == ("past.3.key", "present.3.value")
    assert hidden_state_name(2) == "hidden_states.2"


@given(st.integers(1, 4), st.integers(1, 16), st.integers(1, 32), st.integers(1, 32))
def test_dims_bind_across_the_inputs(batch: int, seq: int, total: int, max_len: int) -> None:
    bound = DECODER.spec().check(decoder_feed(batch, seq, total, max_len))
    assert bound == {"batch": batch, "seq": seq, "total": total, "max_len": max_len}


def test_a_mismatch_says_what_was_bound_so_far() -> None:
    feed = decoder_feed(1, 3, 3, 32) | {"position_ids": np.zeros((1, 4), np.int64)}
    assert error_of(DECODER.spec(), feed) == (
        "graph 'decoder', input 'position_ids': want int64['batch', 'seq'], got int64[1, 4] (so far batch=1, seq=3)"
    )


def test_the_caches_of_all_layers_have_one_length() -> None:
    feed = decoder_feed(2, 1, 1, 32) | {"past.1.value": np.zeros((2, 1, 31, 4), np.float16)}
    assert error_of(DECODER.spec(), feed) == (
        "graph 'decoder', input 'past.1.value': want float16['batch', 1, 'max_len', 4], got float16[2, 1, 31, 4] "
        "(so far batch=2, seq=1, total=1, max_len=32)"
    )


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((1, 3, 28, 42), np.float64), "got float64[1, 3, 28, 42]"),
        (np.zeros((1, 3, 42, 28), np.float32), "got float32[1, 3, 42, 28]"),
        (np.zeros((3, 28, 42), np.float32), "got float32[3, 28, 42]"),
        (np.zeros((1, 1, 3, 28, 42), np.float32), "got float32[1, 1, 3, 28, 42]"),
        (np.float32(0), "got float32[]"),
        (np.zeros((0, 3, 28, 42), np.float32), "with images in 1..5, got float32[0, 3, 28, 42]"),
        (np.zeros((6, 3, 28, 42), np.float32), "with images in 1..5, got float32[6, 3, 28, 42]"),
    ],
)
def test_other_dtypes_shapes_and_sizes_are_refused(pixels: np.ndarray, message: str) -> None:
    want = "graph 'vision', input 'pixel_values': want float32['images', 3, 28, 42]"
    text = error_of(VISION.spec(max_images=5), {"pixel_values": pixels})
    assert text.startswith(want)
    assert text.endswith(message)


def test_missing_and_unknown_inputs_are_named() -> None:
    feed = decoder_feed(1, 1, 1, 1)
    del feed["last_index"]
    text = error_of(DECODER.spec(), {**feed, "past.2.key": np.zeros(1), "cache": np.zeros(1)})
    assert text == "graph 'decoder': missing inputs ['last_index'], unknown inputs ['cache', 'past.2.key']"


def test_a_dim_twice_in_one_shape_binds_once() -> None:
    spec = GraphSpec("square", (TensorSpec("x", "int8", ("n", "n")),), (), (Dim("n", 1, 2, 9),))
    assert spec.check({"x": np.zeros((3, 3), np.int8)}) == {"n": 3}
    assert error_of(spec, {"x": np.zeros((3, 4), np.int8)}) == (
        "graph 'square', input 'x': want int8['n', 'n'], got int8[3, 4]"
    )


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 4, 3)])
def test_a_dims_range_is_ordered(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ContractError, match="dim 'seq': want 1 <= min <= opt <= max"):
        Dim("seq", *sizes)


@pytest.mark.parametrize("longest", [1, 3, 4096])
def test_every_decoder_has_an_ordered_profile(longest: int) -> None:
    shape = DecoderShape("float32", 8, 1, 1, 4, 11, longest)
    assert {d.name: d.max for d in shape.spec(2).dims} == dict.fromkeys(("seq", "total", "max_len"), longest) | {
        "batch": 2
    }

"""The growing cache's two halves on the fake GPU, against NumPy arrays that are appended to and packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from llava_deploy.engines.contract import DecoderShape
from llava_deploy.engines.errors import BackendError
from llava_deploy.runtime.cache_map import CacheMap, Packing
from llava_deploy.runtime.tensorrt.cuda import Device
from llava_deploy.runtime.tensorrt.ping_pong import PingPong

if TYPE_CHECKING:
    from fake_gpu import FakeGpu

SHAPE = DecoderShape("float16", hidden_size=8, layers=2, kv_heads=3, head_dim=4, vocab_size=5, max_positions=64)
BATCH, MAX_LEN = 2, 12
NAMES = [f"{layer}.{part}" for layer in range(SHAPE.layers) for part in ("key", "value")]


def moved(cache: np.ndarray, packing: Packing) -> np.ndarray:
    """``[batch, heads, places, head_dim]`` after the moves."""
    packed = np.zeros((*cache.shape[:2], packing.past_len[1], cache.shape[3]), cache.dtype)
    for run in packing.runs:
        packed[run.row, :, run.target : run.target + run.count] = cache[run.row, :, run.source : run.source + run.count]
    return packed


@pytest.mark.parametrize("seed", range(4))
def test_it_holds_what_arrays_hold(fake_gpu: FakeGpu, seed: int) -> None:
    """The step is done by hand: what was there, and new numbers after it, go to the present."""
    rng = np.random.default_rng(seed)
    device = Device()
    cache, kept = PingPong(device, SHAPE, BATCH, MAX_LEN + 1), CacheMap(BATCH, MAX_LEN)
    want = {name: np.zeros((BATCH, SHAPE.kv_heads, 1, SHAPE.head_dim), np.float16) for name in NAMES}
    packings = 0

    def held(kind: str, name: str, places: int) -> np.ndarray:
        shape = (BATCH, SHAPE.kv_heads, places, SHAPE.head_dim)
        address = cache.bindings()[f"{kind}.{name}"]
        return fake_gpu.memory.view(address, 2 * int(np.prod(shape))).view(np.float16).reshape(shape)

    lengths = np.zeros(BATCH, np.int64)
    for _ in range(40):
        seq = int(rng.integers(1, 4))
        if lengths.max() + seq > MAX_LEN or rng.random() < 0.2:
            lengths = rng.integers(0, lengths + 1) if rng.random() < 0.7 else np.zeros_like(lengths)
        if lengths.max() + seq > MAX_LEN:
            continue
        if (packing := kept.packing(lengths, seq)) is not None:
            cache.pack(packing)
            kept.packed(packing)
            want = {name: moved(array, packing) for name, array in want.items()}
            packings += 1
        device.synchronize()
        for name in NAMES:
            np.testing.assert_array_equal(held("past", name, kept.past_len), want[name])
            new = rng.standard_normal((BATCH, SHAPE.kv_heads, seq, SHAPE.head_dim)).astype(np.float16)
            want[name] = np.concatenate([want[name], new], axis=2)
            held("present", name, kept.past_len + seq)[:] = want[name]
        kept.written(lengths, seq)
        cache.swap()
        lengths = lengths + rng.integers(0, seq + 1, BATCH)
    assert packings > 3


def test_it_says_what_it_has_no_room_for(fake_gpu: FakeGpu) -> None:
    fake_gpu.memory.total = 1 << 12
    with pytest.raises(
        BackendError, match=r"the KV cache of 2 x 12 tokens, twice, as it grows .*: want 6,144 bytes on the"
    ):
        PingPong(Device(), SHAPE, BATCH, MAX_LEN + 1)
    assert fake_gpu.live() == {}

"""How fast the runtime is with a backend: pictures, first token, decode, and how much memory it takes.

Times are those of the public interface: from the call to the token on the host.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from backends import load
from device_memory import device_peak, host_peak
from names import BackendUnderTest
from PIL import Image

from llava_deploy.engines.errors import BackendError
from llava_deploy.engines.manifest import DECODER_GRAPH, Manifest
from llava_deploy.runtime import Answer, Llava
from llava_deploy.runtime.generation import prefill
from llava_deploy.runtime.new_tokens import NewTokens
from llava_deploy.runtime.prompt import images_of, render_chat

QUESTION = "What is in the picture? " * 8
PREFILLED = 640
CONTEXTS = (64, 640, 1900)
STEPS = 32
BATCH_STEPS = 16
FIRSTS = 7
"""Pictures for the time to the first token, each a new one, as known ones are not encoded again."""

ANSWER = 128
"""Tokens of the answer that decode is timed over."""


def measure(
    bundle: str, backend: BackendUnderTest, max_len: int, copy_gb_per_s: float | None, batches: Sequence[int]
) -> dict[str, Any]:
    """A part: load the bundle, answer, and time it.

    Args:
        bundle: directory.
        backend: what runs it.
        max_len: slots of the cache; a TensorRT engine has those that it was built with.
        copy_gb_per_s: what the GPU copies, for the share of its bandwidth that decode reaches.
        batches: rows that decode is timed with as well, fewer first.
    """
    with device_peak() as peak:
        began = time.perf_counter()
        llava = load(Path(bundle), backend, max_len)
        load_s = time.perf_counter() - began
        _answer(llava, picture(llava, 0), 4)  # kernels are loaded and graphs captured here
        first_s = time.perf_counter() - began
        _answer(llava, picture(llava, 1), ANSWER)
    result: dict[str, Any] = {
        "backend": llava.backend,
        "load_s": round(load_s, 2),
        "load_and_first_answer_s": round(first_s, 2),
        "device_peak_bytes": peak.device,
        "vision_ms": _vision_ms(llava),
        **_answers(llava),
        "prefill_tokens": min(PREFILLED, llava.max_len),
        "prefill_ms": _prefill_ms(llava, min(PREFILLED, llava.max_len)),
        "decode_ms_at": {
            str(context): _decode_ms(llava, 1, context, STEPS)
            for context in CONTEXTS
            if context + STEPS < llava.max_len
        },
        "host_peak_bytes": host_peak(),
        "decode_at_batch": _batches(llava, batches),
    }
    at = min(result["prompt_tokens"] + ANSWER // 2, llava.max_len)
    return {**result, **bandwidth(_step_bytes(llava, at), result["decode_tokens_per_s"], copy_gb_per_s)}


def bandwidth(step_bytes: int, tokens_per_s: float, copy_gb_per_s: float | None) -> dict[str, Any]:
    """What decode reads a second: the decoder's weights and the visible cache, once a token; beside the GPU's copy."""
    reached = step_bytes * tokens_per_s / 1e9
    share = None if copy_gb_per_s is None else round(reached / copy_gb_per_s, 3)
    return {"step_bytes": step_bytes, "decode_gb_per_s": round(reached, 2), "share_of_copy_bandwidth": share}


def decoder_bytes(manifest: Manifest) -> int:
    """Bytes of the decoder's weights, all of which a token's step reads; the embedding table is not among them."""
    return manifest.entry(f"{DECODER_GRAPH}.data").size


def picture(llava: Llava, seed: int) -> Image.Image:
    """Noise of the size that the tower takes; each seed is another picture."""
    shape = llava.manifest.vision
    pixels = np.random.default_rng(seed).integers(0, 256, (shape.image_height, shape.image_width, 3), np.uint8)
    return Image.fromarray(pixels)


def median_ms(call: Callable[[], object], times: int) -> float:
    """Median of the milliseconds that it takes, after one call that does not count."""
    took = []
    for _ in range(times + 1):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1e3)
    return round(statistics.median(took[1:]), 3)


def _step_bytes(llava: Llava, context: int) -> int:
    shape = llava.manifest.decoder
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * np.dtype(shape.dtype).itemsize * context
    return int(decoder_bytes(llava.manifest) + cache)


def _answer(llava: Llava, shown: Image.Image, tokens: int) -> Answer:
    """An answer of ``tokens`` tokens, or as many as the cache has room for."""
    content = [{"type": "image", "image": shown}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    prompt = render_chat(messages, llava.manifest.chat)
    return llava.generate([prompt], [images_of(messages)], max_new_tokens=tokens)[0]


def _answers(llava: Llava) -> dict[str, Any]:
    """First tokens, the picture's preprocessing not counted, and one long answer."""
    first = []
    for seed in range(2, 2 + FIRSTS):
        timings = _answer(llava, picture(llava, seed), 1).timings
        first.append((timings.ttft - timings.preprocess) * 1e3)
    long = [_answer(llava, picture(llava, seed), ANSWER).timings for seed in (100, 101, 102)]
    rate = statistics.median(timings.decode_tokens_per_second for timings in long)
    return {
        "prompt_tokens": timings.prompt_tokens,
        "ttft_ms": round(statistics.median(first), 3),
        "answer_tokens": [timings.new_tokens for timings in long],
        "decode_tokens_per_s": round(rate, 2),
    }


def _vision_ms(llava: Llava) -> float:
    """One picture's pixels on the host to its features, waited for."""
    pixels = llava.encoder.pixels([picture(llava, 200)])

    def encode() -> None:
        (features,) = llava.encoder.vision.encode(pixels)
        if not isinstance(features, np.ndarray):
            features.numpy()

    return median_ms(encode, 10)


def _embeds(llava: Llava, tokens: int) -> np.ndarray:
    shape = llava.manifest.decoder
    drawn = np.random.default_rng(3).standard_normal((1, tokens, shape.hidden_size), np.float32) * 0.5
    return drawn.astype(shape.dtype)


def _prefill_ms(llava: Llava, tokens: int) -> float:
    """Embeddings on the host to the logits of the last one."""
    llava.decoder.begin(1)
    prompt = NewTokens(_embeds(llava, tokens), (), 0, np.array([tokens]))
    return median_ms(lambda: _finite(prefill(llava.decoder, prompt)), 5)


def _decode_ms(llava: Llava, rows: int, context: int, steps: int) -> float:
    """One token a row behind ``context`` others, the median of some steps."""
    llava.decoder.begin(rows)
    shape = llava.manifest.decoder
    tokens = np.resize(_embeds(llava, 1), (rows, 1, shape.hidden_size))
    last, at = np.zeros(rows, np.int64), iter(range(context, context + steps + 1))
    return median_ms(lambda: _finite(llava.decoder.step(tokens, np.full(rows, next(at)), last)), steps)


def _batches(llava: Llava, batches: Sequence[int]) -> dict[str, Any]:
    """Tokens a second of all rows together, behind as many tokens as a prompt with a picture has; or why not."""
    found: dict[str, Any] = {}
    for rows in batches:
        context = min(PREFILLED, llava.max_len - BATCH_STEPS - 1)
        try:
            milliseconds = _decode_ms(llava, rows, context, BATCH_STEPS)
        except BackendError as error:  # a cache of so many rows has no room, say
            found[str(rows)] = {"not_measured": str(error)}
            break
        found[str(rows)] = {"step_ms": milliseconds, "tokens_per_s": round(1e3 * rows / milliseconds, 1)}
    return found


def _finite(logits: np.ndarray) -> None:
    greatest = float(logits.max())
    if not math.isfinite(greatest):
        raise ValueError(f"logits: want finite values, found {greatest}")

"""A llama.cpp model with its context, driven through the C functions: no Python of llama-cpp-python's own is timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp as c
import numpy as np
from llama_cpp import Llama

BATCH = 512


class Context:
    """A model that reads tokens and decodes greedily.

    Args:
        slots: of the KV cache.
    """

    def __init__(self, model: Path, slots: int, threads: int) -> None:
        self._llama = Llama(
            str(model), n_ctx=slots, n_batch=BATCH, n_ubatch=BATCH, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        self.pointer = self._llama.ctx
        self.model = self._llama.model
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self._one = c.llama_batch_init(1, 0, 1)

    def clear(self) -> None:
        """Forget what the cache holds."""
        c.llama_memory_clear(c.llama_get_memory(self.pointer), True)

    def read(self, ids: list[int]) -> None:
        """Prefill; logits of the last token only."""
        for at in range(0, len(ids), BATCH):
            part = ids[at : at + BATCH]
            tokens = (c.llama_token * len(part))(*part)
            require(c.llama_decode(self.pointer, c.llama_batch_get_one(tokens, len(part))), "llama_decode")

    def decode(self, position: int, tokens: int, on_tokens: Callable[[int], None]) -> list[int]:
        """``tokens`` greedy tokens behind ``position`` others, whose last one's logits are there."""
        ids: list[int] = []
        while True:
            logits = np.ctypeslib.as_array(c.llama_get_logits_ith(self.pointer, -1), shape=(self.vocabulary,))
            ids.append(int(logits.argmax()))
            on_tokens(1)
            if len(ids) == tokens:
                return ids
            one = self._one
            one.n_tokens, one.token[0], one.pos[0], one.logits[0] = 1, ids[-1], position, 1
            one.n_seq_id[0], one.seq_id[0][0] = 1, 0
            require(c.llama_decode(self.pointer, one), "llama_decode")
            position += 1


def require(code: int, function: str) -> None:
    """Raise where a function of llama.cpp has failed.

    Raises:
        ValueError: the code is not 0.
    """
    if code:
        raise ValueError(f"{function} returned {code}")

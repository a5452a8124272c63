"""Single tokens are read from the arrays that the caller fills anew, whatever was bound before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llava_deploy.runtime import Llava

PROMPT, TOKENS = 5, 4


@pytest.fixture(scope="module")
def llava(demo_bundle: Path) -> Llava:
    return Llava.load(demo_bundle, threads=1)


@pytest.fixture(params=[1, 3])
def inputs(llava: Llava, request: pytest.FixtureRequest) -> tuple[np.ndarray, list[np.ndarray]]:
    """A prompt a row ``[batch, seq, hidden]``, then embeddings of single tokens ``[batch, 1, hidden]``."""
    shape, rng = llava.manifest.decoder, np.random.default_rng(request.param)
    sizes = [(request.param, length, shape.hidden_size) for length in (PROMPT, *[1] * TOKENS)]
    prompt, *tokens = ((rng.standard_normal(size) * 0.02).astype(shape.dtype) for size in sizes)
    return prompt, tokens


def start(llava: Llava, prompt: np.ndarray) -> np.ndarray:
    """Read the prompt; zeros int64 ``[batch]``."""
    llava.decoder.begin(len(prompt))
    zeros = np.zeros(len(prompt), np.int64)
    llava.decoder.step(prompt, zeros, zeros + PROMPT - 1)
    return zeros


def anew(llava: Llava, prompt: np.ndarray, tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Logits after each token, every step with arrays of its own."""
    zeros = start(llava, prompt)
    steps = enumerate(tokens, PROMPT)
    return [llava.decoder.step(token.copy(), zeros + slot, zeros.copy()).copy() for slot, token in steps]


def test_arrays_that_are_filled_anew(llava: Llava, inputs: tuple[np.ndarray, list[np.ndarray]]) -> None:
    prompt, tokens = inputs
    wanted = anew(llava, prompt, tokens)
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-4
    embeds, slots = np.empty_like(tokens[0]), np.zeros(len(prompt), np.int64)
    for _ in range(2):  # the second time, a prompt was bound in their place
        zeros = start(llava, prompt)
        for slot, token in enumerate(tokens, PROMPT):
            embeds[...], slots[...] = token, slot
            np.testing.assert_array_equal(llava.decoder.step(embeds, slots, zeros), wanted[slot - PROMPT])


def test_arrays_that_cannot_be_bound_as_they_lie(llava: Llava, inputs: tuple[np.ndarray, list[np.ndarray]]) -> None:
    prompt, tokens = inputs
    wanted = anew(llava, prompt, tokens)
    zeros = start(llava, prompt)
    for slot, token in enumerate(tokens, PROMPT):
        spread = np.repeat(token, 2, axis=2)[..., ::2]
        fixed = token.copy()
        fixed.setflags(write=False)
        slots = zeros + slot
        for embeds, write in ((spread, slots), (fixed, slots), (token, np.repeat(slots, 2)[::2])):  # to the same slot
            np.testing.assert_array_equal(llava.decoder.step(embeds, write, zeros), wanted[slot - PROMPT])

"""What the threads of a session do when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_deploy.runtime import Llava

WAIT = 0.01  # seconds
REPEATED = 5


@pytest.fixture(scope="module")
def llava(demo_bundle: Path) -> Llava:
    return Llava.load(demo_bundle, backend="onnxruntime", threads=2, max_len=256)


def busy(run: Callable[[], object]) -> float:
    """Share of a wait behind ``run`` in which the process computes, the least of some."""
    shares = []
    for _ in range(REPEATED):
        run()
        began = time.process_time()
        time.sleep(WAIT)
        shares.append((time.process_time() - began) / WAIT)
    return min(shares)


def test_no_thread_of_the_tower_spins_beside_the_prompt(llava: Llava) -> None:
    shape = llava.manifest.vision
    pixels = np.zeros((16, 3, shape.image_height, shape.image_width), np.float32)

    assert busy(lambda: llava.encoder.vision.encode(pixels)) < 0.2


def test_no_thread_of_a_decoder_spins_when_its_step_is_done(llava: Llava) -> None:
    llava.decoder.begin(1)
    embeds, slots = llava.encoder.embed(list(range(4, 68)))[None], np.zeros(1, np.int64)

    assert busy(lambda: llava.decoder.step(embeds, slots, np.array([63]))) < 0.2

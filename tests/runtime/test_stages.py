"""Comparisons that ``verify`` and ``selftest`` share."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.runtime.stages import StageResult, first_failure, pixel_stage, position_errors, stage, token_stage

PLAIN = ImageRecipe(
    pad_to_square=False,
    pad_color=(0, 0, 0),
    resize=None,
    resample=3,
    crop=None,
    rescale_factor=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.25, 0.5),
)


def test_errors_are_of_each_position() -> None:
    wanted = np.array([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]], np.float16)
    found = wanted.astype(np.float32)
    found[0, 0] += 0.5
    assert position_errors(found, wanted) == pytest.approx([0.1, 0.0, 0.0])
    result = stage("logits", "logits", found, wanted, 0.2)
    assert (result.error, result.max_abs_error, result.ok) == (pytest.approx(0.1), 0.5, True)
    assert not stage("logits", "logits", found, wanted, 0.05).ok
    assert not stage("logits", "logits", np.full((3, 2), np.nan), wanted, 0.05).ok


def test_pixels_are_told_in_levels() -> None:
    wanted = np.zeros((1, 3, 2, 2), np.float32)
    found = wanted.copy()
    found[0, 1, 0, 0] = 4 / 255  # one level is 1 / 255 over the deviation
    result = pixel_stage(found, wanted, PLAIN)
    assert (result.error, result.ok) == (1.0, True)
    assert not pixel_stage(2 * found, wanted, PLAIN).ok
    assert pixel_stage(found[:, :, :1], wanted, PLAIN).detail == "shapes differ: [1, 3, 1, 2], PyTorch [1, 3, 2, 2]"


def test_greedy_tokens_and_their_near_ties() -> None:
    logits = np.array([[1.0, 0.0, 0.0], [0.0, 5.0, 4.99], [2.0, 0.0, 0.0]], np.float32)

    def ask(found: list[int], noise: float) -> StageResult:
        return token_stage("tokens", "tokens", found, [0, 1, 0], logits, noise)

    assert ask([0, 1, 0], 0.0).detail == "3 of 3 greedy tokens equal"
    near = ask([0, 2, 2], 0.01)
    assert near.ok
    assert "near-tie" in near.detail
    far = ask([0, 2, 2], 0.001)
    assert not far.ok
    assert (far.error, far.max_abs_error) == (2.0, math.inf)
    assert "PyTorch's choice leads by 1.0e-02" in far.detail
    short = ask([0, 1], 1.0)
    assert not short.ok
    assert short.error == 1.0


def test_the_first_failure_and_json_without_nan() -> None:
    stages = [
        StageResult(name, "decoder", error, error, 1e-4, "")
        for name, error in (("first", 1e-5), ("second", math.nan), ("third", math.inf))
    ]
    assert first_failure(stages) == "second"
    assert first_failure(stages[:1]) is None
    assert [stage.to_dict()["error"] for stage in stages] == [1e-5, None, None]
    assert [stage.to_dict()["ok"] for stage in stages] == [True, False, False]
    json.dumps([stage.to_dict() for stage in stages], allow_nan=False)

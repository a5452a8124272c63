"""Limits follow from what chance does: noise passes however large it is, a fault does not however small."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.engines.names import Precision
from llava_deploy.runtime.preprocess import preprocess
from llava_deploy.runtime.selftest.limits import (
    Arithmetic,
    Limits,
    Rounding,
    compared,
    compared_pixels,
    moved,
    rounds_activations,
    shift_stage,
)
from llava_deploy.runtime.stages import INT8_TOLERANCE, QUANTIZED_TOLERANCE, TOLERANCE, position_errors

RECIPE = ImageRecipe(
    pad_to_square=True,
    pad_color=(122, 116, 104),
    resize=("shortest_edge", 48),
    resample=3,
    crop=(48, 48),
    rescale_factor=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


def picture() -> Image.Image:
    """Not square, with a little of everything in it."""
    ramp = np.linspace(0, 255, 90 * 64 * 3).reshape(64, 90, 3)
    noise = np.random.default_rng(1).integers(-40, 40, ramp.shape)
    return Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))


def runs(noise: float, fault: float, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A computation of 60 positions that rounds by ``noise`` and is off by ``fault``; again; and PyTorch's."""
    drawn = np.random.default_rng(0)
    wanted = drawn.standard_normal((60, 256))
    off = wanted + fault * drawn.standard_normal(256)
    found, again = (off + noise * drawn.standard_normal(off.shape) for _ in range(2))
    return found.astype(np.float32), again.astype(np.float32), wanted.astype(dtype)


@pytest.mark.parametrize("noise", [1e-6, 1e-5, 3e-5])
def test_noise_passes_and_a_fault_of_ten_times_its_size_does_not(noise: float) -> None:
    rounding = Rounding("fp32", Arithmetic.FLOATS)
    for fault, ok in ((0.0, True), (10 * noise, False)):
        found, again, wanted = runs(noise, fault)
        (limits,) = rounding.limits([position_errors(again, found)])
        result = compared("logits", "logits", found, wanted, limits)
        assert result.ok == ok, result
        assert limits.chance == pytest.approx(noise * math.sqrt(2), rel=0.2)
    assert "60 positions" in result.detail


@pytest.mark.parametrize("noise", [4e-4, 1e-3])
def test_in_float16_a_fault_smaller_than_the_noise_is_seen_as_a_shift(noise: float) -> None:
    rounding = Rounding("fp16", Arithmetic.FLOATS)
    assert rounding.shows_shifts
    for fault, ok in ((0.0, True), (0.9 * noise, False)):
        found, again, wanted = runs(noise, fault, np.float16)
        (limits,) = rounding.limits([position_errors(again, found)])
        assert compared("logits", "logits", found, wanted, limits).ok
        assert shift_stage("logits, shift", "logits", [(found, again, wanted)], rounding).ok == ok
    assert not Rounding("fp32", Arithmetic.FLOATS).shows_shifts
    assert not Rounding("fp16", Arithmetic.GPU).shows_shifts


@pytest.mark.parametrize(
    ("precision", "arithmetic", "most"),
    [
        ("fp32", Arithmetic.FLOATS, TOLERANCE["fp32"]),
        ("fp16", Arithmetic.FLOATS, TOLERANCE["fp16"]),
        ("int4", Arithmetic.INTEGERS, QUANTIZED_TOLERANCE),
        ("fp16", Arithmetic.GPU, TOLERANCE["fp16"]),
    ],
)
def test_a_backend_that_rolls_dice_is_allowed_no_more_than_verify_allows(
    precision: Precision, arithmetic: Arithmetic, most: float
) -> None:
    (limits,) = Rounding(precision, arithmetic).limits([np.ones(3, np.float32)])
    assert limits.worst == limits.mean == most


def test_integers_are_allowed_what_verify_allows_where_chance_does_less() -> None:
    (limits,) = Rounding("int4", Arithmetic.INTEGERS).limits([np.full(3, 1e-3, np.float32)])
    assert limits.worst == limits.mean == INT8_TOLERANCE


def test_a_goldens_own_chance_counts_where_it_is_more_and_none_that_is_no_number() -> None:
    calm, wild, broken = np.full(30, 1e-6), np.full(2, 1e-5), np.full(3, np.nan)
    first, second, third = Rounding("fp32", Arithmetic.FLOATS).limits([calm, wild, broken])
    assert first.mean < second.mean
    assert third.mean == first.mean
    assert all(math.isfinite(limits.worst) for limits in (first, second, third))


def test_what_is_no_number_and_what_has_another_shape_fail() -> None:
    limits = Limits(1.0, 1.0, None)
    wanted = np.ones((2, 3), np.float32)
    assert compared("splice", "splice", wanted, wanted, limits).ok
    assert not compared("splice", "splice", np.array([[1, 1, 1], [1, np.nan, 1]], np.float32), wanted, limits).ok
    assert not compared("splice", "splice", np.full((2, 3), np.inf, np.float32), wanted, limits).ok
    result = compared("splice", "splice", wanted[:1], wanted, limits)
    assert not result.ok
    assert result.detail == "shapes differ: [1, 3], PyTorch [2, 3]"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_quarter_of_the_values_is_moved_to_the_next(dtype: type) -> None:
    values = np.random.default_rng(2).standard_normal((40, 50)).astype(dtype)
    one, again = moved(values, np.dtype(dtype)), moved(values, np.dtype(dtype))
    assert one.dtype == dtype
    assert np.array_equal(one, again)
    steps = np.abs(one.astype(np.float64) - values.astype(np.float64)) / np.spacing(np.abs(values)).astype(np.float64)
    assert 0.2 < (one != values).mean() < 0.3
    assert steps.max() <= 1


def test_levels_that_round_activations() -> None:
    assert [level for level in (None, 0, 1, 2, 3, 4) if rounds_activations(level)] == [2, 3, 4]


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.48145466, 0.4578275, 0.40921073)},
        {"std": (0.26962954, 0.26130258, 0.27577711)},
        {"resample": 2},
        {"resample": 1},
        {"resize": ("shortest_edge", 49)},
        {"pad_color": (122, 116, 105)},
        {"pad_to_square": False},
        {"rescale_factor": 1 / 256},
    ],
    ids=lambda change: str(next(iter(change.items()))),
)
def test_pixels_of_a_constant_off_by_the_smallest_step_that_matters(change: dict[str, object]) -> None:
    wanted = preprocess(picture(), RECIPE)[None]
    assert compared_pixels(wanted, wanted, RECIPE).ok
    found = preprocess(picture(), replace(RECIPE, **change))[None]
    assert not compared_pixels(found, wanted, RECIPE).ok


def test_pixels_that_were_rounded_the_other_way_now_and_then_pass() -> None:
    wanted = preprocess(picture(), RECIPE)[None]
    assert RECIPE.std is not None
    found = wanted.copy()
    found[0, 0].flat[::70] += np.float32(1 / 255 / RECIPE.std[0])
    result = compared_pixels(found, wanted, RECIPE)
    assert result.ok
    assert result.detail.startswith("1.000 levels at worst")
    found[0, 0].flat[::7] += np.float32(1 / 255 / RECIPE.std[0])
    assert not compared_pixels(found, wanted, RECIPE).ok
    assert not compared_pixels(found[:, :, 1:], wanted, RECIPE).ok


def test_a_crop_off_by_a_pixel() -> None:
    whole = np.asarray(picture().resize((50, 50)), np.float32).transpose(2, 0, 1)[None] / 255
    recipe = replace(RECIPE, mean=None, std=None)
    assert not compared_pixels(whole[:, :, 1:49, 1:49], whole[:, :, 1:49, 0:48], recipe).ok

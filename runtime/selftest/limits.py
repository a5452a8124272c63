"""How far what is computed here may be from what PyTorch computed where the goldens were recorded, and why so far.

Two figures of each stage, since one alone sees too little: the worst position, which tells a picture or a token that
went wrong, and the mean of all positions, which a wrong weight moves and chance does not. Rounding is as likely up as
down: over many positions its mean is known closely, so that its limit can be near, where the worst needs room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.engines.names import AccuracyLevel, Precision
from llava_deploy.runtime.stages import INT8_TOLERANCE, TOLERANCE, StageKind, StageResult, position_errors


@dataclass(frozen=True)
class Limits:
    """Largest relative error ``|found - wanted| / |wanted|`` (2-norms): of a position, and of all of them on average.

    ``why`` says what is allowed for, for people.
    """

    worst: float
    mean: float
    why: str


FLOAT32 = Limits(TOLERANCE["fp32"], 1e-5, "float32")
"""Sums in another order: measured 2e-6 and 5e-7."""

FLOAT16_VALUES = Limits(2e-3, 4e-4, "float32, from and to values in float16")
"""An ONNX Runtime engine of fp16 or int4 weights computes in float32; the goldens, the pixels that go in and the
features that come out are rounded to float16, by 2e-4 each (2-norms). Measured 7e-4 and 3e-4."""

FLOAT16 = Limits(TOLERANCE["fp16"], 3e-3, "float16")
"""Every product's result is rounded: the canonical fp16 graphs, and TensorRT. Measured on a CPU 1.6e-3 and 4e-4."""

INT8 = Limits(INT8_TOLERANCE, 3e-2, "8-bit integers")
"""The inputs of every product are rounded to 8 bits. Measured 3e-2 and 1e-2."""

FLOAT32_SPLICE, FLOAT16_SPLICE = 1e-6, 1e-3
"""Of embeddings, which are copied: a unit in the last place."""

PIXELS_WORST, PIXELS_MEAN = 1.0, 0.02
"""Levels of 8 bits. Pillow's resize is exact, but one built for other vector instructions may round a value the other
way now and then; a constant that is off moves every value."""

_EXACT_LEVELS = (None, 0, 1)


def float_limits(precision: Precision, *, engine: bool) -> Limits:
    """Of graphs that round nothing to integers; ``engine``: one of ONNX Runtime, whose floats are of 32 bits."""
    if precision == "fp32":
        return FLOAT32
    return FLOAT16_VALUES if engine else FLOAT16


def rounds_activations(level: AccuracyLevel | None) -> bool:
    """Whether ONNX Runtime multiplies quantised weights in less than float32 at this accuracy level."""
    return level not in _EXACT_LEVELS


def compared(
    name: str, kind: StageKind, found: np.ndarray, wanted: np.ndarray, limits: Limits, note: str = ""
) -> StageResult:
    """Hold ``[..., n]`` against PyTorch's, of the same shape; the figure that is nearest to its limit is told."""
    if found.shape != wanted.shape:
        return failed(name, kind, f"shapes differ: {list(found.shape)}, PyTorch {list(wanted.shape)}")
    if not wanted.size:
        return StageResult(name, kind, 0.0, 0.0, limits.worst, "nothing to compare")
    errors = position_errors(found, wanted)
    worst, mean = float(errors.max()), float(errors.mean(dtype=np.float64))
    largest = float(np.abs(found.astype(np.float32) - wanted.astype(np.float32)).max())
    error, tolerance = _nearest((worst, limits.worst), (mean, limits.mean))
    detail = f"relative error {worst:.1e} at worst, {mean:.1e} of {errors.size} positions on average"
    return StageResult(name, kind, largest, error, tolerance, f"{detail}; in {limits.why}{note}")


def compared_pixels(found: np.ndarray, wanted: np.ndarray, recipe: ImageRecipe) -> StageResult:
    """Hold ``[pictures, 3, height, width]`` against PyTorch's, in 8-bit levels."""
    if found.shape != wanted.shape:
        return failed("pixels", "pixels", f"shapes differ: {list(found.shape)}, PyTorch {list(wanted.shape)}")
    std = np.array(recipe.std if recipe.std is not None else (1.0, 1.0, 1.0), np.float32)[:, None, None]
    difference = np.abs(found - wanted)
    levels = difference * std / (recipe.rescale_factor if recipe.rescale_factor is not None else 1.0)
    # A level as float32 comes out of the arithmetic: 1.0000 is one level.
    worst, mean = round(float(levels.max()), 3), float(levels.mean(dtype=np.float64))
    error, tolerance = _nearest((worst, PIXELS_WORST), (mean, PIXELS_MEAN))
    detail = f"{worst:.3f} levels at worst, {mean:.4f} on average"
    return StageResult("pixels", "pixels", float(difference.max()), error, tolerance, detail)


def failed(name: str, kind: StageKind, detail: str) -> StageResult:
    """A stage that gave nothing to compare."""
    return StageResult(name, kind, math.inf, math.inf, 0.0, detail)


def _nearest(*figures: tuple[float, float]) -> tuple[float, float]:
    """Of errors with their tolerances, the one that is furthest on its way to it; NaN is further than all."""
    return max(figures, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])

"""How far what is computed here may be from what PyTorch computed where the goldens were recorded, and why so far.

No fixed figure serves: one that lets a deep model in float16 pass lets a wrong weight pass in a small one. So what
chance does is measured, here and on what is loaded: each stage runs a second time with a quarter of its inputs moved to
the next value of their dtype, which is less than they were rounded by. Nothing but rounding differs between both runs,
and it is drawn anew all through the model, in whatever way the backend rounds. The difference from PyTorch may be a few
times as large, and the rounding of the goldens themselves comes on top. A wrong weight is in both runs alike, so that
it moves them away from PyTorch without moving them apart.

Two figures of each stage, since one alone sees too little: the worst position, which tells a picture or a token that
went wrong, and the mean of all positions, which a wrong weight moves and chance hardly does. In float16 the mean of the
errors themselves is looked at, too: what chance adds points anywhere and is less the more positions there are, what a
wrong weight adds is much the same at all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.engines.names import AccuracyLevel, Precision
from llava_deploy.runtime.stages import (
    INT8_TOLERANCE,
    QUANTIZED_TOLERANCE,
    TOLERANCE,
    StageKind,
    StageResult,
    pixel_levels,
    position_errors,
)

PIXELS_WORST, PIXELS_MEAN = 1.0, 0.02
"""Levels of 8 bits. Pillow's resize is exact, but one built for other vector instructions may round a value the other
way now and then; a constant that is off moves every value."""

_EXACT_LEVELS = (None, 0, 1)
_MOVED = 8  # of so many values one moves up and one down
_TIMES = 4.0
"""How many times chance the mean may be; the worst position one time more. Measured: 2.5 at most, and 3.5 where weights
had been rounded, which chance knows nothing of."""

_TIMES_SHIFT, _TIMES_RECORDED = 3.0, 2.5
"""Likewise of :func:`shift_stage`, and of what the goldens were rounded by. Measured: 0.55 of both together at most,
on the shipped model and on a decoder of SmolLM2's weights."""


@dataclass(frozen=True)
class Limits:
    """Largest relative error ``|found - wanted| / |wanted|`` (2-norms): of a position, and of all of them on average.

    ``chance`` is the mean difference between two runs whose inputs differ by less than their rounding; ``None`` where
    nothing is computed.
    """

    worst: float
    mean: float
    chance: float | None


class Arithmetic(Enum):
    """What a stage's products are computed in."""

    FLOATS = "floats, by ONNX Runtime"
    INTEGERS = "8-bit integers, by ONNX Runtime"
    GPU = "floats, by TensorRT"


@dataclass(frozen=True)
class Rounding:
    """What a stage's numbers are like: the bundle's precision, and what products are computed in."""

    precision: Precision
    arithmetic: Arithmetic

    @property
    def dtype(self) -> np.dtype:
        """Of what goes into a graph, and of the goldens."""
        return np.dtype(np.float32 if self.precision == "fp32" else np.float16)

    @property
    def recorded(self) -> tuple[float, float]:
        """How far goldens are from what they were rounded from, at worst and on average.

        float16: half a unit in the last place, and the mean of that over all mantissas with a fifth more. float32: no
        rounding to speak of, but exponentials of another library, and sums in another order.
        """
        return (4e-6, 1e-6) if self.precision == "fp32" else (2.0**-11, 2.5e-4)

    @property
    def shows_shifts(self) -> bool:
        """Whether a weight that is off by a percent may drown in what chance does at single positions.

        In float32 it does not. Among 8-bit integers nothing helps, so that those graphs are looked at in floats, too.
        """
        return self.precision != "fp32" and self.arithmetic is Arithmetic.FLOATS

    def limits(self, chances: Sequence[np.ndarray]) -> list[Limits]:
        """Of each golden, from the differences between its two runs, ``[positions]``, and between those of all.

        A golden's own chance counts where it is more than that of all together: a few positions may have been lucky.
        In floats never more is allowed than ``verify`` allows. For kernels whose noise so small a move does not draw
        anew, no less is: those of a GPU (none was at hand), and those of 8-bit integers, which see few of the moves (5
        times chance was measured); a deep model is allowed more there where chance alone does more, up to what tells
        it from another model.
        """
        every = _finite(np.concatenate([np.zeros(0, np.float32), *(chance.ravel() for chance in chances)]))
        return [self._limits(_finite(chance), every) for chance in chances]

    def _limits(self, own: np.ndarray, every: np.ndarray) -> Limits:
        chance = max(float(each.mean(dtype=np.float64)) for each in (own, every))
        largest = float(every.max())
        if self.arithmetic is Arithmetic.INTEGERS:
            wide = [max(INT8_TOLERANCE, times) for times in ((_TIMES + 1) * largest, _TIMES * chance)]
            return Limits(min(QUANTIZED_TOLERANCE, wide[0]), min(QUANTIZED_TOLERANCE, wide[1]), chance)
        most = TOLERANCE[self.precision]
        if self.arithmetic is Arithmetic.GPU:
            return Limits(most, most, chance)
        worst, mean = self.recorded
        return Limits(min(most, worst + (_TIMES + 1) * largest), min(most, mean + _TIMES * chance), chance)


def shift_stage(
    name: str, kind: StageKind, runs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], rounding: Rounding
) -> StageResult:
    """Whether the values are off the same way at all positions of all goldens, as by a wrong weight.

    Args:
        name: of the stage.
        kind: of the stage.
        runs: of each golden what was found, what a second run gave, and what is wanted, ``[..., n]``.
        rounding: see there.
    """
    scale = [np.maximum(np.linalg.norm(_rows(wanted), axis=-1, keepdims=True), 1e-30) for _, _, wanted in runs]
    off = [(_rows(found) - _rows(wanted)) / by for (found, _, wanted), by in zip(runs, scale, strict=True)]
    apart = [(_rows(again) - _rows(found)) / by for (found, again, _), by in zip(runs, scale, strict=True)]
    shift, chance = (float(np.linalg.norm(np.concatenate(each).mean(axis=0))) for each in (off, apart))
    count = sum(map(len, off))
    tolerance = _TIMES_RECORDED * rounding.recorded[1] / math.sqrt(count) + _TIMES_SHIFT * chance
    detail = f"all {count} positions off by {shift:.1e} the same way; {chance:.1e} by chance"
    return StageResult(name, kind, shift, shift, min(tolerance, TOLERANCE[rounding.precision]), detail)


def _rows(values: np.ndarray) -> np.ndarray:
    """float64 ``[positions, n]``."""
    return values.reshape(-1, values.shape[-1]).astype(np.float64)


def rounds_activations(level: AccuracyLevel | None) -> bool:
    """Whether ONNX Runtime multiplies quantised weights in less than float32 at this accuracy level."""
    return level not in _EXACT_LEVELS


def moved(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values as ``dtype``, a quarter of them, always the same ones, moved to the next value up or down."""
    exact = values.astype(dtype)
    drawn = np.random.default_rng(0).integers(0, _MOVED, exact.shape)
    up, down = (np.nextafter(exact, dtype.type(end)) for end in (np.inf, -np.inf))
    return np.where(drawn == 0, up, np.where(drawn == 1, down, exact))


def compared(name: str, kind: StageKind, found: np.ndarray, wanted: np.ndarray, limits: Limits) -> StageResult:
    """Hold ``[..., n]`` against PyTorch's, of the same shape; the figure that is nearest to its limit is told."""
    if found.shape != wanted.shape:
        return failed(name, kind, f"shapes differ: {list(found.shape)}, PyTorch {list(wanted.shape)}")
    errors = position_errors(found, wanted)
    worst, mean = float(errors.max()), float(errors.mean(dtype=np.float64))
    largest = float(np.abs(found.astype(np.float32) - wanted.astype(np.float32)).max())
    error, tolerance = _nearest((worst, limits.worst), (mean, limits.mean))
    detail = f"relative error {mean:.1e} on average of {errors.size} positions, {worst:.1e} at worst"
    chance = "" if limits.chance is None else f"; {limits.chance:.1e} by chance"
    return StageResult(name, kind, largest, error, tolerance, f"{detail}{chance}")


def compared_pixels(found: np.ndarray, wanted: np.ndarray, recipe: ImageRecipe) -> StageResult:
    """Hold ``[pictures, 3, height, width]`` against PyTorch's, in 8-bit levels."""
    if found.shape != wanted.shape:
        return failed("pixels", "pixels", f"shapes differ: {list(found.shape)}, PyTorch {list(wanted.shape)}")
    levels = pixel_levels(found, wanted, recipe)
    # A level as float32 comes out of the arithmetic: 1.0000 is one level.
    worst, mean = round(float(levels.max()), 3), float(levels.mean(dtype=np.float64))
    error, tolerance = _nearest((worst, PIXELS_WORST), (mean, PIXELS_MEAN))
    detail = f"{worst:.3f} levels at worst, {mean:.4f} on average"
    return StageResult("pixels", "pixels", float(np.abs(found - wanted).max()), error, tolerance, detail)


def failed(name: str, kind: StageKind, detail: str) -> StageResult:
    """A stage that gave nothing to compare."""
    return StageResult(name, kind, math.inf, math.inf, 0.0, detail)


def _nearest(*figures: tuple[float, float]) -> tuple[float, float]:
    """Of errors with their tolerances, the one that is furthest on its way to it; NaN is further than all."""
    return max(figures, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])


def _finite(errors: np.ndarray) -> np.ndarray:
    """Those that are numbers, or a zero: a golden that gives none fails by itself."""
    flat = errors.ravel()
    numbers = flat[np.isfinite(flat)]
    return numbers if numbers.size else np.zeros(1, np.float32)

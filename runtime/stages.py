"""What a comparison with recorded or computed answers of PyTorch finds: a result a stage, and how far each may be off.

``verify`` compares with PyTorch as it runs, ``selftest`` with what PyTorch gave when the goldens were recorded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.engines.names import Precision

StageKind: TypeAlias = Literal[
    "files",
    "pixels",
    "tower",
    "projector",
    "image features",
    "prompt",
    "splice",
    "weights",
    "decoder",
    "logits",
    "tokens",
]
"""In the order in which data passes them; ``verify`` looks into image features and logits more closely."""

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int4": 1e-2, "int4-awq": 1e-2}
"""Largest relative error ``|found - wanted| / |wanted|`` (2-norms) of a position, by the bundle's precision."""

QUANTIZED_TOLERANCE = 0.5
"""The same, for logits of the bundle's int4 weights against those of the checkpoint's floats: small enough to tell a
model from another one (unrelated logits are 1.4 apart), no measure of what quantisation costs, which is ``eval``'s."""

INT8_TOLERANCE = 1e-1
"""The same, for logits and for a tower's features, where ONNX Runtime rounds the activations of each product to 8 bits:
accuracy level 4, and what ``build --int8`` names."""


@dataclass(frozen=True)
class StageResult:
    """One stage: what differs between PyTorch and the bundle, and how far it may.

    For pixels the error is in 8-bit levels; for tokens it is the tokens that differ; for the rest it is the relative
    error.
    """

    name: str
    kind: StageKind
    max_abs_error: float
    error: float
    tolerance: float
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the stage is within its tolerance; NaN is not."""
        return self.error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON: an error that is no number, or endless, is ``None``."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {**values, "ok": self.ok}


def first_failure(stages: Iterable[StageResult]) -> str | None:
    """The first stage that left its tolerance: where to look."""
    return next((stage.name for stage in stages if not stage.ok), None)


def position_errors(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Relative error of each position, the last axis being its values: ``[..., n]`` to float32 ``[...]``.

    Position by position: the features of a picture are so much larger than text that together they would hide it.
    """
    want = wanted.astype(np.float32)
    off = np.linalg.norm(found.astype(np.float32) - want, axis=-1)
    relative: np.ndarray = off / np.maximum(np.linalg.norm(want, axis=-1), 1e-30)
    return relative


def stage(name: str, kind: StageKind, found: np.ndarray, wanted: np.ndarray, tolerance: float) -> StageResult:
    """Compare ``[..., n]`` with PyTorch's, of the same shape, position by position; the worst one counts."""
    relative = float(position_errors(found, wanted).max())
    worst = float(np.abs(found.astype(np.float32) - wanted.astype(np.float32)).max())
    return StageResult(name, kind, worst, relative, tolerance, f"relative error {relative:.1e}, largest {worst:.1e}")


def pixel_levels(found: np.ndarray, wanted: np.ndarray, recipe: ImageRecipe) -> np.ndarray:
    """How far normalised pixels ``[pictures, 3, height, width]`` are apart, in 8-bit levels.

    Of the values the difference, times the deviation, over the rescale factor.
    """
    std = np.array(recipe.std if recipe.std is not None else (1.0, 1.0, 1.0), np.float32)[:, None, None]
    levels: np.ndarray = np.abs(found - wanted) * std
    return levels if recipe.rescale_factor is None else levels / recipe.rescale_factor


def pixel_stage(found: np.ndarray, wanted: np.ndarray, recipe: ImageRecipe) -> StageResult:
    """Pixels against PyTorch's, in 8-bit levels."""
    if found.shape != wanted.shape:
        shapes = f"shapes differ: {list(found.shape)}, PyTorch {list(wanted.shape)}"
        return StageResult("pixels", "pixels", float("inf"), float("inf"), 1.0, shapes)
    levels = float(pixel_levels(found, wanted, recipe).max())
    # A level as float32 comes out of the arithmetic: 1.0000 is one level.
    return StageResult(
        "pixels", "pixels", float(np.abs(found - wanted).max()), round(levels, 3), 1.0, f"{levels:.3f} levels"
    )


def token_stage(
    name: str, kind: StageKind, found: Sequence[int], wanted: Sequence[int], logits: np.ndarray, noise: float
) -> StageResult:
    """Greedy tokens; where they part, PyTorch's own two choices may be no further apart than the noise.

    Args:
        name: of the stage.
        kind: of the stage.
        found: tokens of what is loaded.
        wanted: PyTorch's.
        logits: ``[tokens, vocab]`` that PyTorch's were chosen from.
        noise: the most that a logit of what is loaded differs from PyTorch's along this answer.
    """
    longest = max(len(found), len(wanted))
    at = next((i for i in range(longest) if tuple(found[i : i + 1]) != tuple(wanted[i : i + 1])), longest)
    if at == longest:
        return StageResult(name, kind, 0.0, 0.0, 0.0, f"{longest} of {longest} greedy tokens equal")
    detail = f"{at} of {longest} greedy tokens equal"
    if at < min(len(found), len(wanted)):
        margin = float(logits[at][wanted[at]]) - float(logits[at][found[at]])
        if margin <= 2 * noise:
            detail += f", then a near-tie: margin {margin:.1e}, logits differ by {noise:.1e}"
            return StageResult(name, kind, margin, 0.0, 0.0, detail)
        detail += f", then PyTorch's choice leads by {margin:.1e}, logits differ by {noise:.1e}"
    return StageResult(name, kind, float("inf"), float(longest - at), 0.0, detail)

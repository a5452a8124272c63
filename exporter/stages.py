"""What a comparison with PyTorch finds: one result a stage, how far each may be off, and the report of all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llava_deploy.engines.manifest import ImageRecipe
from llava_deploy.engines.names import Precision

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

    ``kind`` is ``pixels``, ``tower``, ``projector``, ``splice``, ``weights``, ``decoder``, ``logits`` or ``tokens``.
    For pixels the error is in 8-bit levels; for tokens it is the tokens that differ; for the rest it is the relative
    error.
    """

    name: str
    kind: str
    max_abs_error: float
    error: float
    tolerance: float
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the stage is within its tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class VerifyReport:
    """All stages, in the order in which data passes them."""

    backend: str
    prompt: str
    stages: tuple[StageResult, ...]

    @property
    def first_failure(self) -> str | None:
        """The first stage that left its tolerance: where to look."""
        return next((stage.name for stage in self.stages if not stage.ok), None)

    @property
    def ok(self) -> bool:
        """Whether every stage is within its tolerance."""
        return self.first_failure is None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        stages = [{**dataclasses.asdict(stage), "ok": stage.ok} for stage in self.stages]
        first = self.first_failure
        return {"ok": self.ok, "first_failure": first, "backend": self.backend, "prompt": self.prompt, "stages": stages}


def position_errors(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Relative error of each position, the last axis being its values: ``[..., n]`` to float32 ``[...]``.

    Position by position: the features of a picture are so much larger than text that together they would hide it.
    """
    want = wanted.astype(np.float32)
    off = np.linalg.norm(found.astype(np.float32) - want, axis=-1)
    relative: np.ndarray = off / np.maximum(np.linalg.norm(want, axis=-1), 1e-30)
    return relative


def stage(name: str, kind: str, found: np.ndarray, wanted: torch.Tensor, tolerance: float) -> StageResult:
    """Compare ``[..., n]`` with PyTorch's, of the same shape, position by position; the worst one counts."""
    want = wanted.float().cpu().numpy()
    relative = float(position_errors(found, want).max())
    worst = float(np.abs(found.astype(np.float32) - want).max())
    return StageResult(name, kind, worst, relative, tolerance, f"relative error {relative:.1e}, largest {worst:.1e}")


def pixel_stage(found: np.ndarray, want: np.ndarray, recipe: ImageRecipe) -> StageResult:
    """Errors in 8-bit levels: normalised values times the deviation, over the rescale factor."""
    std = np.array(recipe.std if recipe.std is not None else (1.0, 1.0, 1.0), np.float32)[:, None, None]
    factor = recipe.rescale_factor if recipe.rescale_factor is not None else 1.0
    if found.shape != want.shape:
        shapes = f"shapes differ: {list(found.shape)}, PyTorch {list(want.shape)}"
        return StageResult("pixels", "pixels", float("inf"), float("inf"), 1.0, shapes)
    difference = np.abs(found - want)
    levels = float((difference * std / factor).max())
    # A level as float32 comes out of the arithmetic: 1.0000 is one level.
    return StageResult("pixels", "pixels", float(difference.max()), round(levels, 3), 1.0, f"{levels:.3f} levels")

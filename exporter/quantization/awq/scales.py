"""The search for the scales of input channels, and where the scales go: into the operation before, exactly.

A channel that is multiplied by its scale in the weight is divided by it in what the weight reads. Source: Lin et al.,
2024, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llava_deploy.exporter.quantization.awq.moments import Moments, relative_error, rounded
from llava_deploy.exporter.quantization.weight import WeightFormat

RATIOS = 20
"""Exponents of the activations' magnitudes that are tried: 0, 1/20, … 19/20."""

_LEAST_MAGNITUDE = 1e-4  # of an activation: a channel that is never used would make all others equal
_FLOAT16 = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Fold:
    """Linear layers that read the same values, and the operation before them that can be scaled, by module name."""

    readers: tuple[str, ...]
    into: str


INPUT_FOLD = Fold(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm")
VALUE_FOLD = Fold(("self_attn.o_proj",), "self_attn.v_proj")
MLP_FOLD = Fold(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")
UP_FOLD = Fold(("mlp.down_proj",), "mlp.up_proj")

FOLDS = (INPUT_FOLD, VALUE_FOLD, MLP_FOLD, UP_FOLD)
"""Of a Llama layer: every linear layer reads in one of them. Gate and activation are not scaled: only what ``up_proj``
gives is multiplied into ``down_proj``'s input; attention is linear in the values, channel by channel."""


@dataclass(frozen=True)
class Choice:
    """Scales ``[in_features]`` and the exponent that gave them; 0 means that nothing is scaled."""

    ratio: float
    scales: torch.Tensor


def choose_scales(
    weights: Sequence[torch.Tensor],
    moments: Moments,
    form: WeightFormat,
    candidates: Iterator[Choice],
) -> Choice:
    """The candidate with the least error, among those that leave no layer with more of it than no scales do.

    Args:
        weights: float32 ``[out_features, in_features]``, of layers that read the same inputs.
        moments: of those inputs.
        form: that they are to be rounded to.
        candidates: the first of them without effect.
    """
    best = next(candidates)
    limits = _errors(weights, best.scales, moments, form)
    least = sum(limits)
    for candidate in candidates:
        errors = _errors(weights, candidate.scales, moments, form)
        if sum(errors) < least and all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            best, least = candidate, sum(errors)
    return best


def _errors(weights: Sequence[torch.Tensor], scales: torch.Tensor, moments: Moments, form: WeightFormat) -> list[float]:
    return [relative_error(w, rounded(w * scales, form).div_(scales), moments.second) for w in weights]


def candidates_from(magnitudes: torch.Tensor) -> Iterator[tuple[float, torch.Tensor]]:
    """Exponents and scales ``[channels]``: magnitudes to the power, over the root of the largest by the smallest."""
    magnitudes = magnitudes.clamp(min=_LEAST_MAGNITUDE)
    for step in range(RATIOS):
        ratio = step / RATIOS
        scales = magnitudes.pow(ratio)
        yield ratio, scales / (scales.max() * scales.min()).sqrt()


def norm_candidates(magnitudes: torch.Tensor, weight: torch.Tensor) -> Iterator[Choice]:
    """Scales that a norm's weight ``[channels]`` can take."""
    for ratio, scales in candidates_from(magnitudes):
        yield Choice(ratio, settled_in_norm(scales, weight)[0])


def row_candidates(
    magnitudes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, heads: HeadSharing
) -> Iterator[Choice]:
    """Scales that the rows of the linear layer before can take; ``magnitudes`` are of the values that are read."""
    least, most = _row_bounds(weight, bias)
    for ratio, scales in candidates_from(heads.gathered(magnitudes)):
        yield Choice(ratio, heads.spread(scales.clamp(min=least, max=most)))


def settled_in_norm(scales: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and a norm's weight over them in float16 values, such that the product is the old weight.

    Rounding goes into the scales, which the linear layers take exactly. A channel whose weight is zero, or would be, is
    not scaled.
    """
    size = weight.abs()
    bounded = torch.clamp(scales, min=size / _FLOAT16.max, max=(size / _FLOAT16.smallest_normal).clamp(min=1))
    folded = (weight / bounded).half().float()
    exact = weight / folded
    usable = torch.isfinite(exact) & (exact > 0)
    return torch.where(usable, exact, 1.0), torch.where(usable, folded, weight)


def _row_bounds(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Between these, a row's largest scale and its bias stay where float16 has its full precision."""
    most = (weight.abs().amax(1) / 15 / _FLOAT16.smallest_normal).clamp(min=1)
    least = torch.zeros_like(most) if bias is None else bias.abs() / _FLOAT16.max
    return least, most


@dataclass(frozen=True)
class HeadSharing:
    """How channels that are read belong to channels that are written.

    Attributes:
        groups: query heads that read the same head of values; 1 where each channel is read once.
        head_dim: channels of a head.
    """

    groups: int
    head_dim: int

    def gathered(self, read: torch.Tensor) -> torch.Tensor:
        """``[heads * head_dim]`` to ``[kv_heads * head_dim]``: the mean over the heads that share."""
        return read.view(-1, self.groups, self.head_dim).mean(1).flatten()

    def spread(self, written: torch.Tensor) -> torch.Tensor:
        """``[kv_heads * head_dim]`` to ``[heads * head_dim]``."""
        heads = written.view(-1, 1, self.head_dim)
        return heads.expand(-1, self.groups, -1).flatten()

    def written(self, read: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`spread`."""
        return read.view(-1, self.groups, self.head_dim)[:, 0].flatten()


ONE_TO_ONE = HeadSharing(1, 1)
"""Each channel is read by one other."""

"""The search for how far each group's range is cut: less range, finer steps (Lin et al., 2024, as in llm-awq)."""

from __future__ import annotations

import torch

from llava_deploy.exporter.quantization.awq.moments import in_groups, on_grid, output_energy, rounded
from llava_deploy.exporter.quantization.rtn import grid_for
from llava_deploy.exporter.quantization.weight import WeightFormat

STEPS = 10
"""Ranges that are tried: whole, then 1/20 less each time, to 11/20."""

_ROWS = 256  # output features at a time, which bounds the copies


def clipped(weight: torch.Tensor, second: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """The weight with the values of each group cut to the range in which rounding leaves the least output error.

    The range is searched with the group's own part of the output; an output whose whole error does not become smaller
    keeps all its values, so that no output is worse for it.

    Args:
        weight: float32 ``[out_features, in_features]``.
        second: second moments of its inputs ``[in_features, in_features]``.
        form: that it is to be rounded to.
    """
    size = in_groups(weight, form).shape[2]
    blocks = torch.stack([second[at : at + size, at : at + size] for at in range(0, weight.shape[1], size)])
    return torch.cat([_clipped(rows, second, blocks, form) for rows in weight.split(_ROWS)])


def _clipped(rows: torch.Tensor, second: torch.Tensor, blocks: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    groups = in_groups(rows, form)  # [rows, groups, group_size]
    low, high = torch.aminmax(groups, dim=2)
    if form.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.ones_like(high)
    least = torch.full_like(high, torch.inf)
    for step in range(STEPS):
        share = torch.full_like(high, 1 - step / (2 * STEPS))
        found = on_grid(_cut(groups, low, high, share), grid_for(low * share, high * share, form), form)
        error = _block_errors(found.sub_(groups), blocks)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    cut = _cut(groups, low, high, best).flatten(1)
    whole_error = output_energy(rounded(rows, form) - rows, second)
    cut_error = output_energy(rounded(cut, form) - rows, second)
    return torch.where((cut_error < whole_error)[:, None], cut, rows)


def _cut(groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return torch.clamp(groups, (low * share)[..., None], (high * share)[..., None])


def _block_errors(delta: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Error of each group's part of the output, ``[rows, groups]``."""
    by_group = delta.transpose(0, 1)  # [groups, rows, group_size]
    return (torch.bmm(by_group, blocks) * by_group).sum(2).T

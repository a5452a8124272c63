"""What a search needs to know of a linear layer's inputs, and the errors that follow from it."""

from __future__ import annotations

import torch

from llava_deploy.exporter.quantization.rtn import Grid, grid_for, round_to_grid
from llava_deploy.exporter.quantization.weight import WeightFormat


class Moments:
    """Second moments and mean magnitudes of a linear layer's inputs, over all calibration tokens.

    The output error of any change ``delta`` of the weight is ``delta @ second @ delta.T`` on its diagonal, summed over
    the tokens: exact, whatever the number of tokens, and no activation has to be kept.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.second = torch.zeros(in_features, in_features, device=device)
        self._magnitudes = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one prompt, float32 ``[..., in_features]``."""
        tokens = inputs.reshape(-1, inputs.shape[-1])
        self.second.addmm_(tokens.T, tokens)
        self._magnitudes += tokens.abs().sum(0, dtype=torch.float64)
        self._tokens += len(tokens)

    @property
    def magnitudes(self) -> torch.Tensor:
        """Mean absolute value of each input, float32 ``[in_features]``."""
        return (self._magnitudes / max(1, self._tokens)).float()


def output_energy(weight: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of ``inputs @ weight.T`` over all tokens: ``[out_features]``."""
    return ((weight @ second) * weight).sum(1)


def relative_error(weight: torch.Tensor, approximation: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared error of a linear layer's output, relative to its mean square; the bias counts in neither."""
    energy = float(output_energy(weight, second).sum(dtype=torch.float64))
    error = float(output_energy(approximation - weight, second).sum(dtype=torch.float64))
    return error / energy if energy > 0 else 0.0


def rounded(weight: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """The values that a weight ``[out_features, in_features]`` has once it is rounded to the nearest."""
    groups = in_groups(weight, form)
    return on_grid(groups, grid_for(*torch.aminmax(groups, dim=2), form), form).flatten(1)


def on_grid(groups: torch.Tensor, grid: Grid, form: WeightFormat) -> torch.Tensor:
    """Values ``[out_features, groups, group_size]`` as a grid has them."""
    codes = round_to_grid(groups.clone(), grid, form)
    if grid.zero_points is not None:
        codes -= grid.zero_points[..., None]
    return codes.mul_(grid.scales[..., None])


def in_groups(weight: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """``[out_features, in_features]`` as ``[out_features, groups, group_size]``, of the same memory."""
    return weight.view(len(weight), 1 if form.group_size is None else -1, form.group_size or weight.shape[1])

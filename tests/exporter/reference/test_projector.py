from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_deploy.engines.errors import CheckpointError
from llava_deploy.exporter.reference.projector import build_vision_projector


def config(**fields: Any) -> Any:
    return SimpleNamespace(mm_hidden_size=4, hidden_size=6, **fields)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ["weight", "bias"]),
        ({"mm_projector_type": "linear"}, ["weight", "bias"]),
        ({"mm_projector_type": "mlp1x_gelu"}, ["0.weight", "0.bias"]),
        ({"mm_projector_type": "mlp2x_gelu"}, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (
            {"mm_projector_type": "mlp3x_gelu"},
            ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"],
        ),
    ],
)
def test_parameter_names_and_width(fields: dict[str, str], names: list[str]) -> None:
    projector = build_vision_projector(config(**fields))
    assert list(projector.state_dict()) == names
    assert projector(torch.zeros(2, 3, 4)).shape == (2, 3, 6)


def test_mlp_is_linear_exact_gelu_linear() -> None:
    projector = build_vision_projector(config(mm_projector_type="mlp2x_gelu"))
    first, second = projector[0], projector[2]  # type: ignore[index]
    x = torch.randn(5, 4)
    hidden = x @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(projector(x), hidden @ second.weight.T + second.bias)


def test_identity() -> None:
    x = torch.randn(2, 4)
    assert build_vision_projector(config(mm_projector_type="identity"))(x) is x


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "xmlp2x_gelu", "resampler", ""])
def test_any_other_type_is_refused_by_name(kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"got {kind!r}"):
        build_vision_projector(config(mm_projector_type=kind))

"""The projector from the vision tower's width to the decoder's (LLaVA, ``multimodal_projector/builder.py``)."""

from __future__ import annotations

import re
from typing import Protocol

from torch import nn

from llava_deploy.engines.errors import CheckpointError

_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")


class ProjectorConfig(Protocol):
    """What :func:`build_vision_projector` reads."""

    mm_projector_type: str
    mm_hidden_size: int
    hidden_size: int


def build_vision_projector(config: ProjectorConfig) -> nn.Module:
    """Build the projector ``[…, mm_hidden_size] -> […, hidden_size]`` that ``config.mm_projector_type`` names.

    ``linear``, ``mlp{N}x_gelu`` (N linear layers with exact GELU between them; parameter names ``0``, ``2``, …) or
    ``identity``. A config without the field means ``linear``, as in the first checkpoints.

    Raises:
        CheckpointError: any other type.

    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if kind == "identity":
        return nn.Identity()
    if match := _MLP.fullmatch(kind):
        layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
        for _ in range(int(match[1]) - 1):
            layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
        return nn.Sequential(*layers)
    raise CheckpointError(
        f"mm_projector_type: want 'linear', 'mlp{{N}}x_gelu' or 'identity', got {kind!r} in the config; "
        "export supports only these projectors"
    )

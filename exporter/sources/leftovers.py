"""Tensors that checkpoints hold and a LLaVA does not use, each by a rule; anything else left over is an error."""

from __future__ import annotations

import re

from llava_deploy.exporter.config import VisionConfig
from llava_deploy.exporter.layouts.clip import is_text_side

_TOWER_LAYER = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")


def rule_for(key: str, name: str | None, vision: VisionConfig, last_layer: int) -> str | None:
    """The rule by which a tensor may be left out, None if there is none.

    Args:
        key: its name in the file.
        name: its canonical name, None if the layout has no such name.
        vision: the tower's config.
        last_layer: how many of the tower's layers the deepest feature layer needs.
    """
    if key.endswith("position_ids"):
        return "a buffer that counts positions; older transformers saved it"
    if key.endswith("rotary_emb.inv_freq"):
        return "a buffer of rotary frequencies, which follow from the config; older transformers saved it"
    if name is None:
        return None
    if name.startswith("vision_tower.post_layernorm."):
        return "the norm of CLIP's pooled output; LLaVA takes hidden states before it"
    match = _TOWER_LAYER.match(name)
    if match and last_layer <= int(match[1]) < vision.num_hidden_layers:
        return "a tower layer past the feature layer"
    return None


def tower_rule_for(key: str) -> str | None:
    """As :func:`rule_for`, for what a tower's own directory may hold besides the tower."""
    return "the part of a whole CLIP model that is not its vision tower" if is_text_side(key) else None

"""CLIP vision towers: their configs and the names of their tensors, inside a checkpoint or in a directory of their own.

Source: transformers, ``models/clip/configuration_clip.py`` and ``modeling_clip.py``.
"""

from __future__ import annotations

import re

from llava_deploy.exporter.config import VisionConfig
from llava_deploy.exporter.layouts import llama
from llava_deploy.exporter.layouts.fields import Fields

MODEL_TYPE = "clip_vision_model"
WHOLE_MODEL_TYPE = "clip"

NO_EFFECT = llama.NO_EFFECT | {"vocab_size"}
"""Published LLaVA configs give their tower a ``vocab_size``; it has none."""

_BARE = re.compile(r"(?:embeddings|pre_layrnorm|encoder|post_layernorm)\.")
_TEXT_SIDE = re.compile(r"(?:clip\.)?(?:text_model\.|text_projection\.|visual_projection\.|logit_scale$)")


def vision_config(fields: Fields) -> VisionConfig:
    """The tower that a ``CLIPVisionConfig`` describes; absent fields have that class's defaults.

    Raises:
        CheckpointError: a field of the wrong type, another kind of tower, or something that cannot be honoured.
    """
    if fields.get("model_type", str, MODEL_TYPE) != MODEL_TYPE:
        raise fields.error("model_type", f"want {MODEL_TYPE!r}", "this version has no other vision tower")
    llama.refuse_unsupported(fields)
    fields.only("num_channels", (3,), "pictures have three channels here")
    hidden, heads = fields.positive("hidden_size", 768), fields.positive("num_attention_heads", 12)
    if hidden % heads:
        raise fields.error("hidden_size", f"want a multiple of num_attention_heads {heads}", "correct the file")
    image, patch = _side(fields, "image_size", 224), _side(fields, "patch_size", 32)
    if patch > image:
        raise fields.error("patch_size", f"want at most image_size {image}", "correct the file")
    return VisionConfig(
        model_type="clip_vision_model",
        hidden_size=hidden,
        intermediate_size=fields.positive("intermediate_size", 3072),
        num_hidden_layers=fields.positive("num_hidden_layers", 12, llama.MOST_LAYERS),
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
        num_channels=3,
        hidden_act=llama.activation(fields, "hidden_act", "quick_gelu"),
        layer_norm_eps=llama.epsilon(fields, "layer_norm_eps", 1e-5),
    )


def _side(fields: Fields, key: str, default: int) -> int:
    value = fields.peek(key)
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1] or type(value[0]) is not int or value[0] < 1:
            raise fields.error(key, "want one whole number, or the same twice", "the tower takes square pictures only")
        return int(value[0])
    return fields.positive(key, default)


def tower_fields(fields: Fields) -> Fields:
    """The vision part of a tower directory's config, which may be that of a whole ``CLIPModel``."""
    kind = fields.require("model_type", str)
    if kind == WHOLE_MODEL_TYPE:
        return fields.child("vision_config")
    if kind != MODEL_TYPE:
        raise fields.error(
            "model_type", f"want {MODEL_TYPE!r} or {WHOLE_MODEL_TYPE!r}", "this version has no other vision tower"
        )
    return fields


def tower_name(key: str) -> str | None:
    """Canonical name of a tensor in a tower directory's file; None for CLIP's text side or an unknown name."""
    key = key.removeprefix("clip.").removeprefix("vision_model.")
    return f"vision_tower.{key}" if _BARE.match(key) else None


def is_text_side(key: str) -> bool:
    """Whether a key belongs to the part of a whole CLIP model that is not its vision tower."""
    return _TEXT_SIDE.match(key) is not None

"""The llava-hf layout: transformers' ``LlavaForConditionalGeneration``, every generation of its key names.

Published checkpoints have ``language_model.model.…``, ``language_model.lm_head.…``, ``vision_tower.vision_model.…`` and
``multi_modal_projector.…``; transformers 4.52 wrote ``model.language_model.…``, ``model.vision_tower.vision_model.…``,
``model.multi_modal_projector.…`` and ``lm_head.…``; transformers 5 dropped ``vision_model.`` from the tower. Each part
is renamed on its own, so files that mix generations (a tower from one, a decoder from another) are read as well.
"""

from __future__ import annotations

import re

from llava_deploy.exporter.config import LlavaConfig, ProjectorConfig, VisionConfig
from llava_deploy.exporter.layouts import clip, llama
from llava_deploy.exporter.layouts.fields import Fields

MODEL_TYPE = "llava"
_DEFAULT_IMAGE_TOKEN = 32000
_DEFAULT_FEATURE_LAYER = -2
_PROJECTOR_LINEARS = {"linear_1": 0, "linear_2": 1}

NO_EFFECT = llama.NO_EFFECT | {"image_seq_length", "ignore_index", "vocab_size"}
"""Also what serves transformers' processor and loss; ``vocab_size`` beside the decoder's own only repeats it."""

_HEAD = re.compile(r"(?:model\.)?(?:language_model\.)?lm_head\.(.+)")
_DECODER = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")
_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)")
_PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.(linear_[12])\.(.+)")


def parse(fields: Fields) -> LlavaConfig:
    """The model that ``config.json`` describes; absent fields have transformers' defaults.

    Raises:
        CheckpointError: ``vision_config`` or ``text_config`` missing, a field of the wrong type, or one that cannot be
            honoured, by name.
    """
    fields.only("model_type", (MODEL_TYPE,), "this is the llava-hf layout")
    llama.refuse_unsupported(fields)
    vision_fields, text = fields.child("vision_config"), fields.child("text_config")
    if text.get("model_type", str, llama.MODEL_TYPE) != llama.MODEL_TYPE:
        raise text.error("model_type", f"want {llama.MODEL_TYPE!r}", "this version has no other decoder")
    # LlavaConfig.__post_init__: either of the two flags ties.
    tied = fields.get("tie_word_embeddings", bool, False) | text.get("tie_word_embeddings", bool, False)
    vision, decoder = clip.vision_config(vision_fields), llama.decoder_config(text, tied)
    layers = feature_layers(fields, "vision_feature_layer", vision)
    strategy = fields.get("vision_feature_select_strategy", str, "default")
    if strategy not in ("default", "full"):
        raise fields.error("vision_feature_select_strategy", "want 'default' or 'full'", "there are no others")
    hidden = decoder.hidden_size
    return LlavaConfig(
        layout="llava-hf",
        vision=vision,
        projector=ProjectorConfig(
            sizes=(vision.hidden_size * len(layers), hidden, hidden),
            hidden_act=llama.activation(fields, "projector_hidden_act", "gelu"),
            bias=fields.get("multimodal_projector_bias", bool, True),
        ),
        decoder=decoder,
        feature_layers=layers,
        feature_select="patch" if strategy == "default" else "cls_patch",
        image_token_id=_image_token(fields, decoder.vocab_size),
        image_aspect_ratio=None,
        tokenizer_model_max_length=None,
        tokenizer_padding_side="right",
    )


def canonical_name(key: str) -> str | None:
    """Canonical name of a tensor in the file; None if the layout has no such name."""
    if match := _PROJECTOR.fullmatch(key):
        return f"projector.{_PROJECTOR_LINEARS[match[1]]}.{match[2]}"
    if match := _HEAD.fullmatch(key):
        return f"lm_head.{match[1]}"
    if match := _DECODER.fullmatch(key):
        return f"language_model.{match[1]}"
    if match := _TOWER.fullmatch(key):
        return f"vision_tower.{match[1]}"
    return None


def feature_layers(fields: Fields, key: str, vision: VisionConfig) -> tuple[int, ...]:
    """Indices into the tower's hidden states: one whole number or a list of them.

    Raises:
        CheckpointError: something else, or a layer that the tower does not have.
    """
    value = fields.peek(key)
    value = _DEFAULT_FEATURE_LAYER if value is None else value
    layers = value if isinstance(value, list) else [value]
    if not layers or any(type(layer) is not int for layer in layers):
        raise fields.error(key, "want a whole number or a list of them", "correct the file")
    depth = vision.num_hidden_layers
    if any(not -depth - 1 <= layer <= depth for layer in layers):
        raise fields.error(key, f"want layers from {-depth - 1} to {depth}", "the tower has no such layer")
    return tuple(layers)


def _image_token(fields: Fields, vocab_size: int) -> int:
    # transformers 5 takes both names for one attribute, image_token_id last.
    index = fields.get("image_token_index", int, _DEFAULT_IMAGE_TOKEN)
    token = fields.get("image_token_id", int, index)
    if not 0 <= token < vocab_size:
        key = "image_token_id" if fields.has("image_token_id") else "image_token_index"
        raise fields.error(key, f"want an id below the vocabulary's {vocab_size}", "correct the file")
    return token

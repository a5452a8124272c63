"""The original layout: ``LlavaLlamaForCausalLM`` of the LLaVA repository (``llava/model/``).

``config.json`` is a Llama config with the ``mm_…`` fields beside it. Names are ``model.layers.…``, ``lm_head.weight``,
``model.mm_projector.…`` and, where the tower is inside, ``model.vision_tower.vision_tower.…``. Projector-only files and
``non_lora_trainables.bin`` use the same names, with prefixes of their own.
"""

from __future__ import annotations

import re

from llava_deploy.exporter.config import LlavaConfig, ProjectorConfig, VisionConfig
from llava_deploy.exporter.layouts import llama
from llava_deploy.exporter.layouts.fields import Fields
from llava_deploy.exporter.layouts.llava_hf import feature_layers

MODEL_TYPES = ("llava", "llava_llama")
TOWER_KEYS = ("mm_vision_tower", "mm_vision_config", "mm_hidden_size")
"""A config of this layout has at least one of these; a plain Llama's has none."""

# What LLaVA's training scripts leave in a config: learning rates, what was frozen, where it was initialised from, and
# sizes that only image_aspect_ratio 'anyres' looks at, which is refused.
_TRAINING = """
    freeze_backbone freeze_mm_mlp_adapter freeze_mm_vision_resampler image_crop_resolution image_grid_pinpoints
    image_split_resolution image_token_id mm_projector_lr mm_vision_tower_lr model_max_length
    pretrain_mm_mlp_adapter tune_mm_mlp_adapter tune_mm_vision_resampler unfreeze_mm_vision_tower
"""
NO_EFFECT = llama.NO_EFFECT | frozenset(_TRAINING.split())
"""Keys of a Llama config or of LLaVA's training that say nothing about inference."""

_MLP = re.compile(r"mlp([1-9]\d*)x_gelu")
_TOWER = re.compile(r"(?:model\.)?vision_tower\.vision_tower\.(?:vision_model\.)?(.+)")
_PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)")
_BARE_PROJECTOR = re.compile(r"(?:(\d+)\.)?(weight|bias)")
_DECODER = re.compile(r"model\.((?:embed_tokens|layers|norm|rotary_emb)\..+)")


def parse(fields: Fields, vision: VisionConfig) -> LlavaConfig:
    """The model that ``config.json`` describes, around the tower ``vision``.

    Raises:
        CheckpointError: a field missing, of the wrong type, or one that cannot be honoured, by name.
    """
    fields.peek("model_type")
    _refuse_unsupported(fields)
    decoder = llama.decoder_config(fields, fields.get("tie_word_embeddings", bool, False))
    if not fields.has("mm_vision_select_layer"):
        fields.require("mm_vision_select_layer", int)
    layers = feature_layers(fields, "mm_vision_select_layer", vision)
    if len(layers) > 1:
        raise fields.error("mm_vision_select_layer", "want one layer", "this layout has no lists of them")
    select = fields.get("mm_vision_select_feature", str, "patch")
    if select not in ("patch", "cls_patch"):
        raise fields.error("mm_vision_select_feature", "want 'patch' or 'cls_patch'", "there are no others")
    aspect = fields.get("image_aspect_ratio", str, "square")
    if aspect not in ("square", "pad"):
        raise fields.error("image_aspect_ratio", "want 'pad' or 'square'", "pictures cut into tiles are not supported")
    padding = fields.get("tokenizer_padding_side", str, "right")
    if padding not in ("left", "right"):
        raise fields.error("tokenizer_padding_side", "want 'left' or 'right'", "correct the file")
    return LlavaConfig(
        layout="llava",
        vision=vision,
        projector=_projector(fields, vision.hidden_size, decoder.hidden_size),
        decoder=decoder,
        feature_layers=layers,
        feature_select="patch" if select == "patch" else "cls_patch",
        image_token_id=None,
        image_aspect_ratio="pad" if aspect == "pad" else None,
        tokenizer_model_max_length=(
            fields.positive("tokenizer_model_max_length", 1) if fields.has("tokenizer_model_max_length") else None
        ),
        tokenizer_padding_side="left" if padding == "left" else "right",
    )


def _refuse_unsupported(fields: Fields) -> None:
    fields.only("use_mm_proj", (True,), "a LLaVA without its projector takes no pictures")
    fields.only(
        "mm_use_im_start_end",
        (False,),
        "prompts with start and end tokens around each picture are not supported by this version",
    )
    # The patch token is in the vocabulary of such models, but never in a prompt (llava/mm_utils.py).
    fields.get("mm_use_im_patch_token", bool, False)
    fields.only("mm_patch_merge_type", ("flat",), "pictures cut into tiles are not supported")
    fields.only("mm_resampler_type", (), "resamplers are not supported")
    fields.only("s2", (False,), "towers at several scales (S2) are not supported")
    fields.peek("s2_scales")


def _projector(fields: Fields, vision_hidden: int, hidden: int) -> ProjectorConfig:
    said = fields.require("mm_hidden_size", int)
    if said != vision_hidden:
        raise fields.error(
            "mm_hidden_size",
            f"want the vision tower's hidden_size {vision_hidden}",
            "is this the tower that the checkpoint was trained with? Pass it with --vision-tower DIR",
        )
    kind = fields.get("mm_projector_type", str, "linear")
    match = _MLP.fullmatch(kind)
    if kind == "identity":
        if vision_hidden != hidden:
            raise fields.error("mm_projector_type", f"want {vision_hidden} and {hidden} equal", "correct the file")
        return ProjectorConfig(sizes=(hidden,), hidden_act="gelu", bias=True)
    if kind != "linear" and match is None:
        raise fields.error(
            "mm_projector_type", "want 'linear', 'mlp{N}x_gelu' or 'identity'", "this version has no other projector"
        )
    linears = 1 if match is None else int(match[1])
    return ProjectorConfig(sizes=(vision_hidden, *[hidden] * linears), hidden_act="gelu", bias=True)


def canonical_name(key: str) -> str | None:
    """Canonical name of a tensor in the file; None if the layout has no such name."""
    if match := _TOWER.fullmatch(key):
        return f"vision_tower.{match[1]}"
    if match := _PROJECTOR.fullmatch(key):
        return _projector_name(match)
    if match := _DECODER.fullmatch(key):
        return f"language_model.{match[1]}"
    return key if key.startswith("lm_head.") else None


def projector_name(key: str) -> str | None:
    """Canonical name of a tensor in a projector-only file, whose names may lack every prefix."""
    match = _PROJECTOR.fullmatch(key) or _BARE_PROJECTOR.fullmatch(key)
    return _projector_name(match) if match else None


def _projector_name(match: re.Match[str]) -> str | None:
    # nn.Sequential counts the activations between the linears: 0, 2, 4, …; a lone nn.Linear has no number.
    position = 0 if match[1] is None else int(match[1])
    return f"projector.{position // 2}.{match[2]}" if position % 2 == 0 else None

"""What a LLaVA checkpoint's config says, parsed once, whichever layout said it; nothing downstream reads config.json.

The parsers are in ``exporter/layouts/``: a value that a config can hold and these classes cannot is refused there by
name, so that nothing is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EMBED_TOKENS = "language_model.embed_tokens.weight"
"""Canonical name of the token-embedding table."""

LM_HEAD = "lm_head.weight"
"""Canonical name of the output layer."""

PROJECTOR = "projector."
"""How canonical names of the projector's weights begin."""

Activation = Literal["quick_gelu", "gelu", "gelu_pytorch_tanh", "silu"]


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower; names as in transformers' ``CLIPVisionConfig``."""

    model_type: Literal["clip_vision_model"]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    hidden_act: Activation
    layer_norm_eps: float

    @property
    def patches(self) -> int:
        """Patch tokens of one picture, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: ``default``, ``linear`` (factor) or ``llama3`` (all fields).

    Source: transformers' ``modeling_rope_utils.py``; fields that a type does not use are ``None``.
    """

    rope_type: Literal["default", "linear", "llama3"]
    theta: float
    factor: float | None
    low_freq_factor: float | None
    high_freq_factor: float | None
    original_max_position_embeddings: int | None


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama decoder; names as in transformers' ``LlamaConfig``."""

    model_type: Literal["llama"]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    hidden_act: Activation
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector: ``sizes`` are the widths from the tower's features to the decoder's hidden size.

    ``identity`` has one size and no weights, ``linear`` two, ``mlp{N}x_gelu`` N + 1. The tensors are
    ``projector.{i}.weight`` (and ``.bias``) for i in ``range(len(sizes) - 1)``, with ``hidden_act`` between them.
    """

    sizes: tuple[int, ...]
    hidden_act: Activation
    bias: bool

    @property
    def kind(self) -> str:
        """The original layout's ``mm_projector_type``."""
        linears = len(self.sizes) - 1
        return {0: "identity", 1: "linear"}.get(linears, f"mlp{linears}x_{self.hidden_act}")


@dataclass(frozen=True)
class LlavaConfig:
    """The whole model.

    Attributes:
        feature_layers: indices into the tower's hidden states (0 is the input of the first layer, negative counts from
            the last layer's output); several are concatenated on the feature axis.
        feature_select: ``patch`` drops the class token ('default' in the llava-hf layout), ``cls_patch`` keeps it
            ('full').
        image_token_id: id of the picture placeholder in the vocabulary; ``None`` in the original layout.
        image_aspect_ratio: ``pad`` makes a picture square before it is resized; ``None`` leaves it to the centre crop.
        tokenizer_model_max_length: LLaVA's limit on a spliced row; ``None`` where the config has none.
    """

    layout: Literal["llava-hf", "llava"]
    vision: VisionConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    feature_layers: tuple[int, ...]
    feature_select: Literal["patch", "cls_patch"]
    image_token_id: int | None
    image_aspect_ratio: Literal["pad"] | None
    tokenizer_model_max_length: int | None
    tokenizer_padding_side: Literal["left", "right"]

    @property
    def image_features(self) -> int:
        """Feature rows of one picture."""
        return self.vision.patches + (self.feature_select == "cls_patch")

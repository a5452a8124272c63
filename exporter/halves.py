"""The two halves of a LLaVA, each a graph of its own: pictures to features, embeddings to logits."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from llava_deploy.exporter.blocks import Linear
from llava_deploy.exporter.config import EMBED_TOKENS, LM_HEAD, LlavaConfig
from llava_deploy.exporter.decoders import llama
from llava_deploy.exporter.decoders.interface import Cache, StepInputs
from llava_deploy.exporter.projector import Projector
from llava_deploy.exporter.towers import clip_vision_model

TOWERS = {"clip_vision_model": clip_vision_model.VisionTower}
DECODERS = {"llama": llama.Decoder}
TOWER_FEATURES = "tower_features"
"""Name, inside the vision graph, of what goes into the projector."""


def resolved_feature_layers(config: LlavaConfig) -> tuple[int, ...]:
    """Feature layers as non-negative indices into the tower's hidden states."""
    states = config.vision.num_hidden_layers + 1
    return tuple(layer % states for layer in config.feature_layers)


class VisionEncoder(nn.Module):
    """Tower, choice of features, projector."""

    def __init__(self, config: LlavaConfig, dtype: ir.DataType) -> None:
        super().__init__()
        tower = TOWERS[config.vision.model_type]
        self.vision_tower = tower(config.vision, resolved_feature_layers(config), dtype)
        self.projector = Projector(config.projector, dtype)
        self.feature_select, self.tokens = config.feature_select, config.vision.patches + 1

    def forward(self, op: OpBuilder, pixel_values: ir.Value) -> ir.Value:
        """``[images, 3, height, width]`` to ``[images, patches, hidden]``."""
        features = self.vision_tower(op, pixel_values)  # [images, 1 + patches, features]
        if self.feature_select == "patch":
            features = op.Slice(features, [1], [self.tokens], [1])
        features.name = TOWER_FEATURES
        return self.projector(op, features)


class LanguageModel(nn.Module):
    """Decoder and output layer; a tied output layer is the decoder's own embedding table."""

    def __init__(self, config: LlavaConfig, dtype: ir.DataType) -> None:
        super().__init__()
        c = config.decoder
        self.language_model = DECODERS[c.model_type](c, dtype)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, False, dtype)

    def forward(self, op: OpBuilder, step: StepInputs, past: list[Cache]) -> tuple[ir.Value, list[Cache]]:
        """Logits ``[batch, vocab]``, float32, and the caches after the step."""
        hidden, present = self.language_model(op, step, past)  # [batch, hidden], or logits where they are tied
        logits = hidden if self.lm_head is None else self.lm_head(op, hidden)
        return op.Cast(logits, to=ir.DataType.FLOAT), present


def decoder_linears(config: LlavaConfig) -> tuple[str, ...]:
    """Canonical names of the weights of the decoder's linear layers, the output layer not among them."""
    modules = LanguageModel(config, ir.DataType.FLOAT).named_modules()
    names = (f"{name}.weight" for name, module in modules if isinstance(module, Linear))
    return tuple(name for name in names if name not in (EMBED_TOKENS, LM_HEAD))
